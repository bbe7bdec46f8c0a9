/* Options: the library's defaults, both ways to change them, and what they come to. */
#include "check.hpp"

#include <cstring>

using vattn::Config;
using vattn::LayoutKind;

static void defaults() {
    vattn_config of_c{};
    CHECK(vattn_config_init(&of_c, sizeof of_c) == VATTN_OK);
    const Config config;
    vattn_config made = config.to_c();
    CHECK(made.extents == nullptr && made.extents_count == 0);
    CHECK(std::memcmp(&made, &of_c, sizeof made) == 0);
    CHECK(config.budget == vattn::Auto && config.max_slots == 1024 && config.max_tokens == 131072);
    CHECK(config.layout == LayoutKind::Sliced && config.background == vattn::Background::Thread);
}

static void every_option() {
    const Config defaults;
    const vattn::Extents extents[] = {{1, 2}, {4, 3}};
    const Config changed = defaults.with_budget(1)
                               .with_max_tokens(2)
                               .with_max_slots(3)
                               .with_spare_slot()
                               .with_tile_tokens(4)
                               .with_page_tokens(5)
                               .with_layout(LayoutKind::Grouped, 6)
                               .with_kv_order(vattn::KvOrder::Interleaved)
                               .with_slack_divisor(7)
                               .with_background(vattn::Background::Caller)
                               .with_reclaim(vattn::Reclaim::Eager)
                               .with_look_ahead(8)
                               .with_look_ahead_budget(9)
                               .with_at_hand(10)
                               .with_commit(vattn::Commit::Whole)
                               .with_extents(extents);
    const vattn_config c = changed.to_c();
    CHECK(c.budget == 1 && c.max_tokens == 2 && c.max_slots == 3 && c.spare_slot == 1 && c.tile_tokens == 4);
    CHECK(c.page_tokens == 5 && c.layout == VATTN_LAYOUT_GROUPED && c.layers_per_tensor == 6);
    CHECK(c.kv_order == VATTN_KV_INTERLEAVED && c.slack_divisor == 7 && c.look_ahead == 8);
    CHECK(c.background == VATTN_BACKGROUND_CALLER && c.reclaim == VATTN_RECLAIM_EAGER);
    CHECK(c.look_ahead_budget == 9 && c.at_hand == 10 && c.commit == VATTN_COMMIT_EXTENTS);
    CHECK(c.extents_count == 2 && c.extents[1].granules == 4 && c.extents[1].count == 3);
    CHECK(c.extents != extents);
    CHECK(c.struct_size == sizeof c && c.reserved == 0);
    // What was changed is a copy.
    CHECK(defaults.budget == vattn::Auto && defaults.extents.empty());
    CHECK(changed.with_commit(vattn::Commit::Whole).to_c().commit == VATTN_COMMIT_WHOLE);
    CHECK(!changed.with_spare_slot(false).spare_slot);
    CHECK(changed.with_layout(LayoutKind::Sliced).layers_per_tensor == 0);

    Config fields;
    fields.max_slots = 3;
    fields.kv_order = vattn::KvOrder::Interleaved;
    fields.extents.push_back({1, 1});
    CHECK(fields.to_c().max_slots == 3 && fields.to_c().kv_order == VATTN_KV_INTERLEAVED);
    CHECK(fields.to_c().extents == fields.extents.data());
}

static void plans() {
    const vattn::Geometry geometry = small_geometry();
    const vattn::Layout layout = vattn::plan_layout(small_config().with_spare_slot(), geometry, granule);
    CHECK(layout.layers == 2 && layout.tensors == 2 && layout.slots == 5 && layout.spare_slot == 4);
    CHECK(layout.max_tokens == 256 && layout.bytes_per_token == 192 && layout.granule == granule);
    CHECK(vattn::plan_layout(small_config(), geometry, granule).spare_slot == vattn::NoSlot);
    const Config apart = small_config().with_layout(LayoutKind::PerLayer);
    CHECK(vattn::plan_layout(apart, geometry, granule).tensors == 4);
    THROWS(Error, InvalidConfig, "vattn_layout_plan: ",
           vattn::plan_layout(small_config().with_max_tokens(0), geometry, granule));
    THROWS(Error, InvalidArgument, "layout",
           vattn::plan_layout(small_config().with_layout(static_cast<LayoutKind>(9)), geometry, granule));
}

static void extents_up_front() {
    const Config config = small_config().with_extents({{1, 3}, {2, 2}});
    World world(config);
    CHECK(world.cache.bytes().held == 7 * granule && world.cache.bytes().free_bytes == 7 * granule);
    THROWS(Error, InvalidArgument, "extents", World(small_config().with_extents({{3, 1}})));
    World whole(small_config().with_commit(vattn::Commit::Whole));
    CHECK(whole.cache.bytes().held == 40 * granule);
}

int main() {
    defaults();
    every_option();
    plans();
    extents_up_front();
    return check_end();
}
