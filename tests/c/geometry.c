/* Models: from numbers, by name, from a config.json; what they keep, and what is refused. */
#include "sizes.h"
#include "world.h"

static void from_numbers(void) {
    const vattn_layers groups[2] = {{3, 4, 16, 8}, {1, 0, 24, 0}};
    vattn_geometry *geometry = NULL, *rank = NULL;
    vattn_geometry_info info;
    vattn_layers layer;
    SIZED(info);
    CHECK_OK(vattn_geometry_create(groups, 2, 1, VATTN_DTYPE_F16, &geometry));
    CHECK_OK(vattn_geometry_describe(geometry, &info));
    CHECK(info.layers == 4 && info.dtype == VATTN_DTYPE_F16);
    CHECK(info.bytes_per_token == 2 * (3 * 4 * (16 + 8) + 24));
    CHECK_OK(vattn_geometry_layer(geometry, 2, &layer));
    CHECK(layer.layers == 1 && layer.kv_heads == 4 && layer.key_dim == 16 && layer.value_dim == 8);
    CHECK_OK(vattn_geometry_layer(geometry, 3, &layer));
    CHECK(layer.layers == 1 && layer.kv_heads == 0 && layer.key_dim == 24 && layer.value_dim == 0);
    CHECK_FAILS_OUT(VATTN_INVALID_ARGUMENT, "layer is 4, and the model has 4", layer,
                    vattn_geometry_layer(geometry, 4, &layer));
    CHECK_FAILS_OUT(VATTN_INVALID_ARGUMENT, "layer is 4294967295", layer,
                    vattn_geometry_layer(geometry, UINT32_MAX, &layer));
    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "out is NULL", vattn_geometry_layer(geometry, 0, NULL));
    CHECK_SIZES_OUT(vattn_geometry_info, "out", vattn_geometry_describe(geometry, it));

    CHECK_OK(vattn_geometry_create(groups, 2, 2, VATTN_DTYPE_MODEL, &rank));
    CHECK_OK(vattn_geometry_describe(rank, &info));
    CHECK(info.dtype == VATTN_DTYPE_BF16 && info.bytes_per_token == 2 * (3 * 2 * (16 + 8) + 24));
    CHECK_OK(vattn_geometry_destroy(rank));
    CHECK_OK(vattn_geometry_destroy(geometry));
    CHECK_OK(vattn_geometry_destroy(NULL));
}

static void all_types(void) {
    const vattn_layers layers = {1, 1, 8, 8};
    const uint64_t bytes[8] = {2, 4, 2, 2, 1, 1, 1, 1};
    for (int32_t dtype = VATTN_DTYPE_MODEL; dtype <= VATTN_DTYPE_U8; dtype++) {
        vattn_geometry *geometry = NULL;
        vattn_geometry_info info;
        SIZED(info);
        CHECK_OK(vattn_geometry_create(&layers, 1, 1, dtype, &geometry));
        CHECK_OK(vattn_geometry_describe(geometry, &info));
        CHECK(info.bytes_per_token == 16 * bytes[dtype]);
        CHECK(info.dtype == (dtype == VATTN_DTYPE_MODEL ? (int32_t)VATTN_DTYPE_BF16 : dtype));
        CHECK_OK(vattn_geometry_destroy(geometry));
    }
}

static void refused_numbers(void) {
    const vattn_layers good = {2, 2, 8, 8};
    const vattn_layers huge[2] = {{65536, UINT32_MAX, UINT32_MAX, UINT32_MAX}, {1, 1, 1, 1}};
    const vattn_layers wrong[] = {{0, 2, 8, 8}, {2, 2, 0, 8}, {2, 2, 8, 0}, {2, 0, 0, 0}, {65537, 1, 8, 8}, huge[0]};
    const char *const said[] = {"0 layers", "0", "0", "0", "65537", "2^64"};
    vattn_geometry *out;
    for (size_t nth = 0; nth < sizeof wrong / sizeof wrong[0]; nth++)
        CHECK_FAILS_OUT(VATTN_INVALID_GEOMETRY, said[nth], out,
                        vattn_geometry_create(&wrong[nth], 1, 1, VATTN_DTYPE_F16, &out));
    CHECK_FAILS_OUT(VATTN_INVALID_GEOMETRY, "layer", out, vattn_geometry_create(huge, 0, 1, VATTN_DTYPE_F16, &out));
    CHECK_FAILS_OUT(VATTN_INVALID_GEOMETRY, "layer", out, vattn_geometry_create(NULL, 0, 1, VATTN_DTYPE_F16, &out));
    CHECK_FAILS_OUT(VATTN_INVALID_ARGUMENT, "groups is NULL and its count is 3", out,
                    vattn_geometry_create(NULL, 3, 1, VATTN_DTYPE_F16, &out));
    CHECK_FAILS_OUT(VATTN_INVALID_ARGUMENT, "groups has 18446744073709551615 elements of 16 bytes", out,
                    vattn_geometry_create(&good, SIZE_MAX, 1, VATTN_DTYPE_F16, &out));
    CHECK_FAILS_OUT(VATTN_INVALID_ARGUMENT, "groups has 1152921504606846976 elements", out,
                    vattn_geometry_create(&good, (size_t)1 << 60, 1, VATTN_DTYPE_F16, &out));
    CHECK_FAILS_OUT(VATTN_INVALID_ARGUMENT, "not a multiple of 4", out,
                    vattn_geometry_create((const vattn_layers *)(const void *)((const char *)&good + 1), 1, 1,
                                          VATTN_DTYPE_F16, &out));
    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "out is NULL", vattn_geometry_create(&good, 1, 1, VATTN_DTYPE_F16, NULL));
    CHECK_FAILS_OUT(VATTN_INVALID_ARGUMENT, "dtype is 8, and the values of vattn_dtype are 0, 1", out,
                    vattn_geometry_create(&good, 1, 1, 8, &out));
    CHECK_FAILS_OUT(VATTN_INVALID_ARGUMENT, "dtype is -1", out, vattn_geometry_create(&good, 1, 1, -1, &out));
    CHECK_FAILS_OUT(VATTN_INVALID_GEOMETRY, "0", out, vattn_geometry_create(&good, 1, 0, VATTN_DTYPE_F16, &out));
    CHECK_FAILS_OUT(VATTN_INVALID_GEOMETRY, "3", out, vattn_geometry_create(&good, 1, 3, VATTN_DTYPE_F16, &out));
}

static void by_name(void) {
    vattn_geometry *geometry = NULL, *out;
    vattn_geometry_info info;
    uint32_t tile = 0;
    SIZED(info);
    CHECK_OK(vattn_geometry_create_preset("llama-3-8b", 1, VATTN_DTYPE_MODEL, &geometry));
    CHECK_OK(vattn_geometry_describe(geometry, &info));
    CHECK(info.layers == 32 && info.bytes_per_token == 131072);
    CHECK_OK(vattn_geometry_tile_tokens(geometry, "fa3-decode", &tile));
    CHECK(tile > 1);
    CHECK_OK(vattn_geometry_tile_tokens(geometry, "flashinfer", &tile));
    CHECK(tile == 1);
    CHECK_FAILS_OUT(VATTN_INVALID_CONFIG, "fa3-window", tile, vattn_geometry_tile_tokens(geometry, "fa9", &tile));
    CHECK_FAILS_OUT(VATTN_INVALID_ARGUMENT, "kernel is NULL", tile,
                    vattn_geometry_tile_tokens(geometry, NULL, &tile));
    CHECK_FAILS_OUT(VATTN_INVALID_ARGUMENT, "kernel is not UTF-8 from byte 2 on", tile,
                    vattn_geometry_tile_tokens(geometry, "fa\xff", &tile));
    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "out is NULL", vattn_geometry_tile_tokens(geometry, "fa3-view", NULL));
    CHECK_OK(vattn_geometry_destroy(geometry));

    CHECK_FAILS_OUT(VATTN_INVALID_GEOMETRY, "llama-3-8b", out,
                    vattn_geometry_create_preset("llama-0", 1, VATTN_DTYPE_MODEL, &out));
    CHECK_FAILS_OUT(VATTN_INVALID_GEOMETRY, "", out, vattn_geometry_create_preset("", 1, VATTN_DTYPE_MODEL, &out));
    CHECK_FAILS_OUT(VATTN_INVALID_ARGUMENT, "name is NULL", out,
                    vattn_geometry_create_preset(NULL, 1, VATTN_DTYPE_MODEL, &out));
    CHECK_FAILS_OUT(VATTN_INVALID_ARGUMENT, "name is not UTF-8 from byte 0 on", out,
                    vattn_geometry_create_preset("\xff", 1, VATTN_DTYPE_MODEL, &out));
    CHECK_FAILS_OUT(VATTN_INVALID_ARGUMENT, "dtype is 99", out,
                    vattn_geometry_create_preset("llama-3-8b", 1, 99, &out));
    CHECK_FAILS_OUT(VATTN_INVALID_GEOMETRY, "0", out,
                    vattn_geometry_create_preset("llama-3-8b", 0, VATTN_DTYPE_MODEL, &out));
    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "out is NULL",
                vattn_geometry_create_preset("llama-3-8b", 1, VATTN_DTYPE_MODEL, NULL));
}

static void from_a_file(void) {
    const char *json = "{\"model_type\": \"llama\", \"num_hidden_layers\": 4, \"num_attention_heads\": 8,"
                       " \"num_key_value_heads\": 2, \"hidden_size\": 256, \"torch_dtype\": \"float16\"}";
    vattn_geometry *geometry = NULL, *out;
    vattn_geometry_info info;
    SIZED(info);
    CHECK_OK(vattn_geometry_create_from_hf_config(json, 2, VATTN_DTYPE_MODEL, &geometry));
    CHECK_OK(vattn_geometry_describe(geometry, &info));
    CHECK(info.layers == 4 && info.dtype == VATTN_DTYPE_F16 && info.bytes_per_token == 4 * 1 * (32 + 32) * 2);
    CHECK_OK(vattn_geometry_destroy(geometry));
    CHECK_OK(vattn_geometry_create_from_hf_config(json, 1, VATTN_DTYPE_F8_E4M3, &geometry));
    CHECK_OK(vattn_geometry_describe(geometry, &info));
    CHECK(info.dtype == VATTN_DTYPE_F8_E4M3 && info.bytes_per_token == 4 * 2 * (32 + 32));
    CHECK_OK(vattn_geometry_destroy(geometry));

    CHECK_FAILS_OUT(VATTN_INVALID_GEOMETRY, "", out,
                    vattn_geometry_create_from_hf_config("{", 1, VATTN_DTYPE_MODEL, &out));
    CHECK_FAILS_OUT(VATTN_INVALID_GEOMETRY, "num_hidden_layers", out,
                    vattn_geometry_create_from_hf_config("{\"model_type\": \"llama\"}", 1, VATTN_DTYPE_MODEL, &out));
    CHECK_FAILS_OUT(VATTN_INVALID_ARGUMENT, "json is NULL", out,
                    vattn_geometry_create_from_hf_config(NULL, 1, VATTN_DTYPE_MODEL, &out));
    CHECK_FAILS_OUT(VATTN_INVALID_ARGUMENT, "json is not UTF-8", out,
                    vattn_geometry_create_from_hf_config("{\"\x80\": 1}", 1, VATTN_DTYPE_MODEL, &out));
    CHECK_FAILS_OUT(VATTN_INVALID_ARGUMENT, "dtype is 1000", out,
                    vattn_geometry_create_from_hf_config(json, 1, 1000, &out));
    CHECK_FAILS_OUT(VATTN_INVALID_GEOMETRY, "0", out,
                    vattn_geometry_create_from_hf_config(json, 0, VATTN_DTYPE_MODEL, &out));
    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "out is NULL",
                vattn_geometry_create_from_hf_config(json, 1, VATTN_DTYPE_MODEL, NULL));
}

int main(void) {
    from_numbers();
    all_types();
    refused_numbers();
    by_name();
    from_a_file();
    return check_end();
}
