# Which versions of vattn this one can stand for: earlier ones of the same minor version while the major one is
# 0, as the SONAME says too, and of the same major version from 1 on. A test holds it against Cargo.toml.
set(PACKAGE_VERSION 0.1.0)

string(REGEX MATCH "^(0\\.[0-9]+|[1-9][0-9]*)" _vattn_series ${PACKAGE_VERSION})
set(PACKAGE_VERSION_COMPATIBLE FALSE)
if(PACKAGE_FIND_VERSION_RANGE)
    if(PACKAGE_VERSION VERSION_GREATER_EQUAL PACKAGE_FIND_VERSION_MIN
            AND (PACKAGE_VERSION VERSION_LESS PACKAGE_FIND_VERSION_MAX
                OR (PACKAGE_VERSION VERSION_EQUAL PACKAGE_FIND_VERSION_MAX
                    AND PACKAGE_FIND_VERSION_RANGE_MAX STREQUAL INCLUDE)))
        set(PACKAGE_VERSION_COMPATIBLE TRUE)
    endif()
elseif(NOT PACKAGE_VERSION VERSION_LESS PACKAGE_FIND_VERSION)
    # 0.1 and 0.1.0 are of the series 0.1; so is a bare 0, which asks for any.
    string(REGEX MATCH "^(0\\.[0-9]+|0|[1-9][0-9]*)" _vattn_wanted "${PACKAGE_FIND_VERSION}")
    if(_vattn_wanted STREQUAL _vattn_series OR (_vattn_wanted STREQUAL 0 AND _vattn_series MATCHES "^0"))
        set(PACKAGE_VERSION_COMPATIBLE TRUE)
    endif()
endif()
if(PACKAGE_VERSION VERSION_EQUAL PACKAGE_FIND_VERSION)
    set(PACKAGE_VERSION_EXACT TRUE)
endif()
unset(_vattn_series)
unset(_vattn_wanted)
