# What find_package(vattn) reads: the targets of the installed library.
#
#     vattn::vattn           the shared library, or the static one: see below
#     vattn::vattn_shared    the shared library, where it is installed
#     vattn::vattn_static    the static library and what it has to be linked with, where it is installed
#
# find_package(vattn COMPONENTS static), or shared, says which one vattn::vattn is, and fails where it is not
# installed. Otherwise vattn::vattn is the static library if BUILD_SHARED_LIBS is set and OFF, else the
# shared one; the other one where only that is installed. The first find_package of a directory decides.
#
# Nothing in here is an absolute path, so the folder that all was installed into can be moved. If the
# libraries lie outside of lib, lib64 and lib/<architecture> there, set vattn_LIBRARY_DIR to their folder.

# This file lies in <root>/share/cmake/vattn.
get_filename_component(_vattn_root "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)
set(_vattn_folders "${_vattn_root}/lib64" "${_vattn_root}/lib")
if(CMAKE_LIBRARY_ARCHITECTURE)
    list(INSERT _vattn_folders 0 "${_vattn_root}/lib/${CMAKE_LIBRARY_ARCHITECTURE}")
endif()
if(vattn_LIBRARY_DIR)
    set(_vattn_folders "${vattn_LIBRARY_DIR}")
endif()

set(_vattn_shared_file "libvattn${CMAKE_SHARED_LIBRARY_SUFFIX}")
set(_vattn_static_file "libvattn.a")
foreach(_vattn_kind shared static)
    set(vattn_${_vattn_kind}_FOUND FALSE)
    foreach(_vattn_folder IN LISTS _vattn_folders)
        set(_vattn_file "${_vattn_folder}/${_vattn_${_vattn_kind}_file}")
        if(EXISTS "${_vattn_file}" AND NOT vattn_${_vattn_kind}_FOUND)
            set(vattn_${_vattn_kind}_FOUND TRUE)
            if(NOT TARGET vattn::vattn_${_vattn_kind})
                string(TOUPPER ${_vattn_kind} _vattn_type)
                add_library(vattn::vattn_${_vattn_kind} ${_vattn_type} IMPORTED)
                set_target_properties(vattn::vattn_${_vattn_kind} PROPERTIES
                    IMPORTED_LOCATION "${_vattn_file}"
                    INTERFACE_INCLUDE_DIRECTORIES "${_vattn_root}/include")
            endif()
        endif()
    endforeach()
endforeach()

# As rustc names them, and vattn.pc in Libs.private.
if(vattn_static_FOUND)
    set_target_properties(vattn::vattn_static PROPERTIES
        IMPORTED_LINK_INTERFACE_LANGUAGES C
        INTERFACE_LINK_LIBRARIES "dl;gcc_s;util;rt;pthread;m;dl;c")
endif()

if(vattn_FIND_COMPONENTS)
    set(_vattn_order ${vattn_FIND_COMPONENTS})
elseif(DEFINED BUILD_SHARED_LIBS AND NOT BUILD_SHARED_LIBS)
    set(_vattn_order static shared)
else()
    set(_vattn_order shared static)
endif()
foreach(_vattn_kind IN LISTS _vattn_order)
    if(TARGET vattn::vattn_${_vattn_kind} AND NOT TARGET vattn::vattn)
        add_library(vattn::vattn INTERFACE IMPORTED)
        set_target_properties(vattn::vattn PROPERTIES INTERFACE_LINK_LIBRARIES vattn::vattn_${_vattn_kind})
    endif()
endforeach()

set(vattn_FOUND TRUE)
list(JOIN _vattn_folders ", " _vattn_where)
if(NOT vattn_shared_FOUND AND NOT vattn_static_FOUND)
    set(vattn_FOUND FALSE)
    set(vattn_NOT_FOUND_MESSAGE
        "neither ${_vattn_shared_file} nor ${_vattn_static_file} is in ${_vattn_where}; set vattn_LIBRARY_DIR to the folder of one")
endif()
foreach(_vattn_kind IN LISTS vattn_FIND_COMPONENTS)
    if(vattn_FOUND AND vattn_FIND_REQUIRED_${_vattn_kind} AND NOT vattn_${_vattn_kind}_FOUND)
        set(vattn_FOUND FALSE)
        if(DEFINED _vattn_${_vattn_kind}_file)
            set(vattn_NOT_FOUND_MESSAGE
                "${_vattn_${_vattn_kind}_file} is not in ${_vattn_where}; install it, or set vattn_LIBRARY_DIR to its folder")
        else()
            set(vattn_NOT_FOUND_MESSAGE "there is no component ${_vattn_kind}; there are shared and static")
        endif()
    endif()
endforeach()

foreach(_vattn_name root folders folder file kind type order where shared_file static_file name)
    unset(_vattn_${_vattn_name})
endforeach()
