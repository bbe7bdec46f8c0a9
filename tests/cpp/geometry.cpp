/* Models: by layers, by name, by description. */
#include "check.hpp"

#include <vector>

using vattn::Dtype;
using vattn::Geometry;
using vattn::Layers;

static bool is(const Layers& layers, std::uint32_t heads, std::uint32_t key, std::uint32_t value) {
    return layers.layers == 1 && layers.kv_heads == heads && layers.key_dim == key &&
           layers.value_dim == value;
}

static void by_layers() {
    const Geometry one{{Layers{32, 8, 128, 128}}};
    CHECK(one.info().layers == 32 && one.info().dtype == Dtype::BF16 && one.info().bytes_per_token == 131072);
    const Geometry two{{{2, 8, 128, 128}, {1, 0, 576, 0}}, 4, Dtype::F32};
    CHECK(two.info().layers == 3 && two.info().dtype == Dtype::F32);
    CHECK(is(two.layer(0), 2, 128, 128) && is(two.layer(2), 0, 576, 0));
    const std::vector<Layers> groups(3, Layers{2, 4, 64, 32});
    CHECK(Geometry(groups).info().layers == 6);
    THROWS(Error, InvalidArgument, "vattn_geometry_layer: ", two.layer(3));
    THROWS(Error, InvalidGeometry, "vattn_geometry_create: ", Geometry(vattn::Span<const Layers>()));
    THROWS(Error, InvalidGeometry, "", Geometry({{1, 8, 0, 128}}));
    THROWS(Error, InvalidGeometry, "", Geometry({{1, 8, 128, 128}}, 3));
    THROWS(Error, InvalidArgument, "dtype is 99", Geometry({{1, 8, 128, 128}}, 1, static_cast<Dtype>(99)));
}

static void by_name() {
    const Geometry model = Geometry::preset("llama-3-8b");
    CHECK(model.info().layers == 32 && is(model.layer(31), 8, 128, 128));
    CHECK(Geometry::preset("llama-3-8b", 4).info().bytes_per_token == model.info().bytes_per_token / 4);
    CHECK(Geometry::preset("llama-3-8b", 1, Dtype::F8E4M3).info().dtype == Dtype::F8E4M3);
    THROWS(Error, InvalidGeometry, "llama-3-8b", Geometry::preset("llama-3-9b"));
    const std::string cut_short("llama-3-8b\0x", 12);
    THROWS(Error, InvalidArgument, "NUL at byte 10 of 12", Geometry::preset(cut_short));
    THROWS(Error, InvalidArgument, "UTF-8", Geometry::preset("\xff"));
}

static void by_description() {
    const char* json = "{\"model_type\": \"llama\", \"num_hidden_layers\": 4, \"num_attention_heads\": 8, "
                       "\"num_key_value_heads\": 2, \"hidden_size\": 512, \"torch_dtype\": \"float16\"}";
    const Geometry model = Geometry::from_hf_config(json);
    CHECK(model.info().layers == 4 && model.info().dtype == Dtype::F16 && is(model.layer(0), 2, 64, 64));
    CHECK(is(Geometry::from_hf_config(json, 2, Dtype::F32).layer(0), 1, 64, 64));
    THROWS(Error, InvalidGeometry, "vattn_geometry_create_from_hf_config: ", Geometry::from_hf_config("{}"));
    THROWS(Error, InvalidArgument, "NUL at byte 2", Geometry::from_hf_config(std::string("{}\0", 3)));
}

static void kernels() {
    const Geometry model = Geometry::preset("llama-3-8b");
    CHECK(model.tile_tokens("fa3-decode") == 176 && model.tile_tokens("torch-varlen") == 1);
    THROWS(Error, InvalidConfig, "fa3-decode", model.tile_tokens("fa4"));
    THROWS(Error, InvalidArgument, "NUL at byte 0", model.tile_tokens(std::string(1, '\0')));
}

int main() {
    by_layers();
    by_name();
    by_description();
    kernels();
    return check_end();
}
