"""Is a model's answer the same with `VattnCache` as with transformers' own cache, and is no memory left?

Tiny models with random weights, on the processor, or on a GPU with `VATTN_TEST_DEVICE=cuda`. Skipped, aloud, where
PyTorch or transformers 5 is missing.
"""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Iterator
from typing import Any

import pytest

import vattn

torch = pytest.importorskip("torch", reason="SKIP: PyTorch is not installed")
transformers = pytest.importorskip(
    "transformers", minversion="5", reason="SKIP: transformers 5 is not installed"
)

from vattn.transformers import VattnCache  # noqa: E402

# Tiny tensors: more threads would wait for each other.
torch.set_num_threads(1)
DEVICE = torch.device(os.environ.get("VATTN_TEST_DEVICE", "cpu"))
small_granules = pytest.mark.skipif(
    DEVICE.type != "cpu", reason="SKIP: a GPU's granules are too large for it"
)


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    """All that a test makes is on the device."""
    with DEVICE:
        yield


SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
KINDS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen3": {"head_dim": 16},
    "Mistral": {"sliding_window": 8},
    "Gemma3Text": {"head_dim": 16, "sliding_window": 8, "num_hidden_layers": 6, "query_pre_attn_scalar": 16},
    "GptOss": {"head_dim": 16, "sliding_window": 8, "num_hidden_layers": 4, "num_local_experts": 4},
    "DeepseekV3": {
        "q_lora_rank": 16,
        "kv_lora_rank": 24,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 32,
        "num_key_value_heads": 8,
    },
}
CLASSES = {
    "Gemma3Text": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "beams": {"num_beams": 4},
    "sequences": {"do_sample": True, "num_return_sequences": 3},
    "beams, sampled": {"do_sample": True, "num_beams": 3, "num_return_sequences": 2},
}


def make(kind: str, *, attention: str = "sdpa", dtype: str = "float32", seed: int = 0, **changes: Any) -> Any:
    """A tiny model with random weights."""
    config_name, model_name = CLASSES.get(kind, (f"{kind}Config", f"{kind}ForCausalLM"))
    config = getattr(transformers, config_name)(**{**SIZES, **KINDS[kind], **changes})
    config._attn_implementation = "eager" if kind == "GptOss" else attention
    torch.manual_seed(seed)
    model = getattr(transformers, model_name)(config).eval().to(getattr(torch, dtype))
    # Weights that make up their mind: with the usual tiny ones all tokens are nearly as likely.
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(4)
    return model


def prompt(rows: int = 3, tokens: int = 11, padded: bool = True) -> dict[str, Any]:
    torch.manual_seed(7)
    ids = torch.randint(3, 97, (rows, tokens))
    mask = torch.ones_like(ids)
    if padded:
        for row in range(1, rows):
            mask[row, : 2 * row] = 0
            ids[row, : 2 * row] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: Any, cache: Any, inputs: dict[str, Any], **options: Any) -> Any:
    torch.manual_seed(3)
    options = {"max_new_tokens": 24, "output_scores": True, "return_dict_in_generate": True, **options}
    return model.generate(**inputs, past_key_values=cache, **options)


def own(model: Any) -> Any:
    return transformers.DynamicCache(config=model.config.get_text_config(decoder=True))


def same(ours: Any, theirs: Any, tolerance: float = 1e-4) -> None:
    assert torch.equal(ours.sequences, theirs.sequences)
    for one, other in zip(ours.scores, theirs.scores, strict=True):
        finite = torch.isfinite(other)
        torch.testing.assert_close(one[finite], other[finite], atol=tolerance, rtol=tolerance)


@pytest.fixture
def driver() -> Iterator[vattn.CheckedDriver]:
    """A driver that knows what is alive, and must know of nothing at the end."""
    inner = (
        vattn.HostDriver("1GiB", granule="64KiB") if DEVICE.type == "cpu" else vattn.CudaDriver(DEVICE.index)
    )
    with inner, vattn.CheckedDriver(inner) as checked:
        yield checked
        gc.collect()
        live = checked.live()
        assert not any(vars(live).values() if hasattr(live, "__dict__") else [live.handles]), live


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_dynamic_cache(kind: str, way: str, driver: vattn.Driver) -> None:
    model = make(kind)
    with VattnCache(model, driver=driver) as cache:
        ours = generate(model, cache, prompt(), **WAYS[way])
        assert cache.get_seq_length() == 11 + 24 - 1
        assert cache.bytes_held() > 0
        same(ours, generate(model, own(model), prompt(), **WAYS[way]))
        del ours


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["Llama", "Gemma3Text"])
def test_every_type_and_back_end(kind: str, dtype: str, attention: str, driver: vattn.Driver) -> None:
    model = make(kind, attention=attention, dtype=dtype)
    with VattnCache(model, driver=driver) as cache:
        ours = generate(model, cache, prompt())
        same(ours, generate(model, own(model), prompt()), 1e-4 if dtype == "float32" else 0.05)


@pytest.mark.parametrize("layout", ["sliced", "per_layer", 2])
@pytest.mark.parametrize("order", ["apart", "interleaved"])
def test_every_layout(layout: Any, order: str, driver: vattn.Driver) -> None:
    model = make("Llama")
    with VattnCache(model, driver=driver, layout=layout, kv_order=order) as cache:
        same(
            generate(model, cache, prompt(), num_beams=3), generate(model, own(model), prompt(), num_beams=3)
        )


@pytest.mark.parametrize("kind", KINDS)
def test_assisted_decoding_crops(kind: str, driver: vattn.Driver) -> None:
    model, assistant = make(kind), make(kind, seed=0)
    # Like the model, but for a few of its opinions: some drafts are taken and some are not.
    torch.manual_seed(5)
    for parameter in assistant.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.02 * parameter.data.std())
    inputs = prompt(rows=1)
    try:
        theirs = generate(model, own(model), inputs, assistant_model=assistant, do_sample=False)
    except RuntimeError as error:
        # 5.17 crops an assistant's window too far.
        pytest.skip(f"SKIP: transformers {transformers.__version__} fails with its own cache: {error}")
    with VattnCache(model, driver=driver) as cache:
        ours = generate(model, cache, inputs, assistant_model=assistant, do_sample=False)
        same(ours, theirs)
        assert torch.equal(ours.sequences, generate(model, own(model), inputs).sequences)


@pytest.mark.parametrize("kind", KINDS)
def test_a_conversation_goes_on_where_it_was(kind: str, driver: vattn.Driver) -> None:
    model = make(kind)
    answers = []
    with VattnCache(model, driver=driver) as cache:
        for past in (cache, own(model)):
            inputs = prompt(rows=2)
            for turn in range(3):
                out = generate(model, past, inputs, max_new_tokens=10)
                more = torch.full((2, 5), 11 + turn)
                ids = torch.cat([out.sequences, more], dim=1)
                mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 15), value=1)
                inputs = {"input_ids": ids, "attention_mask": mask}
            answers.append(ids)
        assert torch.equal(*answers)


@pytest.mark.parametrize("kind", ["Llama", "Gemma3Text"])
def test_prompts_in_parts(kind: str, driver: vattn.Driver) -> None:
    model = make(kind)
    options: dict[str, Any] = {"prefill_chunk_size": 7}
    with VattnCache(model, driver=driver) as cache:
        inputs = prompt(rows=2, tokens=60)
        same(generate(model, cache, inputs, **options), generate(model, own(model), inputs, **options))


def steps(model: Any, cache: Any, tokens: Any) -> Any:
    with torch.no_grad():
        return model(input_ids=tokens, past_key_values=cache).logits


@pytest.mark.parametrize("kind", ["Llama", "Gemma3Text", "DeepseekV3"])
def test_rows_come_go_and_change_places(kind: str, driver: vattn.Driver) -> None:
    model = make(kind)
    torch.manual_seed(11)
    tokens = torch.randint(3, 97, (3, 60))
    with VattnCache(model, driver=driver) as cache:
        theirs = own(model)

        def both(ids: Any) -> None:
            torch.testing.assert_close(
                steps(model, cache, ids), steps(model, theirs, ids), atol=1e-4, rtol=1e-4
            )

        both(tokens[:, :13])
        for past in (cache, theirs):
            past.reorder_cache(torch.tensor([2, 0, 0]))
        both(tokens[:, 13:14])
        for past in (cache, theirs):
            past.batch_repeat_interleave(5)
        both(tokens[:, 14:16].repeat_interleave(5, dim=0))
        for past in (cache, theirs):
            past.batch_select_indices(torch.tensor([14, 3, 7, 0]))
        both(tokens[:1, 16:20].expand(4, 4))
        for past in (cache, theirs):
            past.batch_select_indices(torch.tensor([True, False, True, True]))
            past.reorder_cache(torch.tensor([0, 1, 2]))
        for at in range(20, 60):
            both(tokens[:, at : at + 1])


def test_without_tokens_there_are_no_rows_to_choose(driver: vattn.Driver) -> None:
    config = transformers.LlamaConfig(**SIZES)
    states = torch.ones(2, 4, 3, 8)
    with VattnCache(config, driver=driver) as cache:
        cache.update(states, states, 0)
        with pytest.raises(ValueError, match=r"no row would be left: call reset\(\)"):
            cache.batch_select_indices(torch.tensor([], dtype=torch.long))
        cache.reset()
        cache.batch_select_indices(torch.tensor([7, 8]))
        cache.batch_repeat_interleave(3)
        with pytest.raises(ValueError, match="states of no rows"):
            cache.update(states[:0], states[:0], 0)
        cache.update(states, states, 0)


def test_a_layer_that_comes_after_the_rows_changed_is_refused(driver: vattn.Driver) -> None:
    states = torch.ones(2, 4, 3, 8)
    with VattnCache(transformers.LlamaConfig(**SIZES), driver=driver) as cache:
        cache.update(states, states, 0)
        cache.reorder_cache(torch.tensor([1, 0]))
        with pytest.raises(RuntimeError, match="rows changed in the midst of its forward pass"):
            cache.update(states, states, 1)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8"])
def test_rows_of_single_bytes_change_places(dtype: str, driver: vattn.Driver) -> None:
    states = torch.arange(2 * 4 * 3 * 8.0).reshape(2, 4, 3, 8).fmod(8).to(getattr(torch, dtype))
    states[1] = states[1].float().neg().to(states.dtype)
    with VattnCache(transformers.LlamaConfig(**SIZES), driver=driver) as cache:
        cache.update(states, states, 0)
        cache.reorder_cache(torch.tensor([1, 1]))
        assert torch.equal(cache.layers[0].keys.float(), states.float()[[1, 1]])


def test_a_crop_that_is_refused_takes_nothing_away(driver: vattn.Driver) -> None:
    # Its layers that keep every token could.
    model = make("Gemma3Text", layer_types=["full_attention", "sliding_attention"] * 3)
    tokens = torch.randint(3, 97, (1, 60))
    with VattnCache(model, driver=driver) as cache:
        whole = steps(model, own(model), tokens)
        steps(model, cache, tokens[:, :50])
        with pytest.raises(RuntimeError, match="activate_past_recording"):
            cache.crop(-3)
        torch.testing.assert_close(steps(model, cache, tokens[:, 50:]), whole[:, 50:], atol=1e-4, rtol=1e-4)
        cache.crop(-60)
        torch.testing.assert_close(steps(model, cache, tokens), whole)


def test_crop_takes_tokens_away_and_reset_all_of_them(driver: vattn.Driver) -> None:
    model = make("Llama")
    tokens = prompt(padded=False)["input_ids"]
    with VattnCache(model, driver=driver) as cache:
        whole = steps(model, cache, tokens)
        for end in (4, -2):
            cache.crop(end)
            assert cache.get_seq_length() == (4 if end == 4 else 9)
            again = steps(model, cache, tokens[:, cache.get_seq_length() :])
            torch.testing.assert_close(again, whole[:, -again.shape[1] :])
        cache.crop(0)
        assert cache.get_seq_length() == 11
        cache.reset()
        assert cache.get_seq_length() == 0
        assert cache.layers[0].keys is None
        # Another batch, in the memory of the last one.
        torch.testing.assert_close(steps(model, cache, tokens[:1]), whole[:1])
        cache.reset()
        torch.testing.assert_close(steps(model, cache, tokens.repeat(9, 1)), whole.repeat(9, 1, 1))


@small_granules
def test_a_window_holds_little_more_than_it_sees(driver: vattn.Driver) -> None:
    model = make("Mistral", sliding_window=64, max_position_embeddings=4096)
    assert [type(layer).__name__ for layer in VattnCache(model).layers] == ["VattnWindowLayer"] * 3
    with VattnCache(model, driver=driver) as cache:
        generate(model, cache, prompt(rows=2), max_new_tokens=400)
        group = cache.groups[0]
        assert group.held <= 63 + 32 + 1
        assert cache.get_seq_length() == 410
        assert cache.bytes_held() <= 2 * group.cache.bytes_for(192)


def test_a_window_gives_back_only_what_it_still_has(driver: vattn.Driver) -> None:
    model = make("Mistral", sliding_window=16)
    tokens = torch.randint(3, 97, (1, 90))
    with VattnCache(model, driver=driver) as cache:
        steps(model, cache, tokens[:, :80])
        with pytest.raises(RuntimeError, match="activate_past_recording"):
            cache.crop(-3)
        cache.activate_past_recording()
        whole = steps(model, cache, tokens[:, 80:])
        cache.crop(-10)
        torch.testing.assert_close(steps(model, cache, tokens[:, 80:]), whole, atol=1e-4, rtol=1e-4)


def test_a_copy_is_a_cache_of_its_own(driver: vattn.Driver) -> None:
    model = make("Gemma3Text")
    tokens = torch.randint(3, 97, (2, 40))
    with VattnCache(model, driver=driver) as cache:
        steps(model, cache, tokens[:, :30])
        with copy.deepcopy(cache) as twin:
            one = steps(model, twin, tokens[:, 30:])
            steps(model, twin, tokens[:, :5])
            assert (cache.get_seq_length(), twin.get_seq_length()) == (30, 45)
        torch.testing.assert_close(steps(model, cache, tokens[:, 30:]), one)


def test_layers_of_other_shapes_and_places_get_caches_of_their_own(driver: vattn.Driver) -> None:
    config = transformers.LlamaConfig(**{**SIZES, "num_hidden_layers": 5})
    theirs = transformers.DynamicCache(config=config)
    shapes = {0: (4, 8, 8), 1: (2, 16, 8), 2: (4, 8, 8), 4: (2, 16, 8)}
    torch.manual_seed(2)
    with VattnCache(config, driver=driver) as cache, torch.no_grad():
        for count in (5, 1, 3, 1):
            for layer, (heads, key_dim, value_dim) in shapes.items():
                keys, values = torch.randn(2, heads, count, key_dim), torch.randn(2, heads, count, value_dim)
                for ours, other in zip(
                    cache.update(keys, values, layer), theirs.update(keys, values, layer), strict=True
                ):
                    assert torch.equal(ours, other)
        assert [group.plan for group in cache.groups] == [[0, 2], [1, 4]]
        assert [group.layers for group in cache.groups] == [2, 2]
        assert cache.get_seq_length(3) == 0
        del ours


def test_tensors_that_outlive_the_cache_keep_its_memory(driver: vattn.CheckedDriver) -> None:
    config = transformers.LlamaConfig(**SIZES)
    states = torch.arange(3 * 4 * 8.0).reshape(1, 4, 3, 8)
    with VattnCache(config, driver=driver) as cache:
        cache.update(states, states, 0)
        keys, _ = cache.update(states, states, 0)
        with pytest.warns(ResourceWarning, match="memory stays until they are gone"):
            cache.close()
    assert torch.equal(keys, torch.cat([states, states], dim=2))
    del keys, _
    VattnCache(config, driver=driver).close()
    with VattnCache(config, driver=driver) as cache:
        cache.update(states, states, 0)


def test_states_of_linear_layers_are_kept_too() -> None:
    model = make_hybrid()
    inputs = prompt(rows=2)
    with VattnCache(model) as cache:
        same(generate(model, cache, inputs), generate(model, own(model), inputs))
        with torch.inference_mode():
            cache.reset()
            model(**prompt(rows=3), past_key_values=cache)
        # Out of the mode, and with fewer rows.
        cache.reset()
        tokens = prompt(rows=1, padded=False)["input_ids"]
        torch.testing.assert_close(steps(model, cache, tokens), steps(model, own(model), tokens))
        with torch.inference_mode():
            model(input_ids=tokens[:, :1], past_key_values=cache)


def make_hybrid() -> Any:
    config = transformers.Qwen3NextConfig(
        **{
            **SIZES,
            "num_hidden_layers": 4,
            "head_dim": 16,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        }
    )
    torch.manual_seed(0)
    return transformers.Qwen3NextForCausalLM(config).eval()


@small_granules
def test_a_budget_says_how_to_cure_it_and_harms_nothing(driver: vattn.Driver) -> None:
    model = make("Llama")
    tokens = prompt(rows=2, tokens=40, padded=False)["input_ids"]
    # A token takes 3 layers x 2 x 4 heads x 8 x 4 bytes: 768, and a row of 64 KiB granules one for keys and
    # one for values.
    with VattnCache(model, driver=driver, budget="256KiB") as cache:
        first = steps(model, cache, tokens)
        with pytest.raises(
            vattn.OutOfBudget, match=r"2 rows of 241 tokens can't be held; give VattnCache a larger budget="
        ):
            steps(model, cache, torch.ones(2, 201, dtype=torch.long))
        assert cache.get_seq_length() == 40
        cache.reset()
        torch.testing.assert_close(steps(model, cache, tokens), first)
    with VattnCache(model, driver=driver, max_tokens=32) as cache:
        with pytest.raises(vattn.TooManyTokens, match="larger max_tokens="):
            steps(model, cache, tokens)


@small_granules
def test_groups_share_a_budget(driver: vattn.Driver) -> None:
    model = make("Gemma3Text", sliding_window=400)
    tokens = torch.randint(3, 97, (1, 400))
    with VattnCache(model, driver=driver, budget="2MiB") as cache:
        for at in range(0, 400, 10):
            steps(model, cache, tokens[:, at : at + 10])
            assert cache.bytes_held() <= 2 << 20
        assert len(cache.groups) == 2


@small_granules
def test_groups_hold_no_more_than_the_budget_together(driver: vattn.Driver) -> None:
    config = transformers.LlamaConfig(**{**SIZES, "num_hidden_layers": 4})

    def take(cache: VattnCache, count: int) -> None:
        for layer in range(4):
            states = torch.ones(1, 4 if layer % 2 else 2, count, 8)
            cache.update(states, states, layer)

    with VattnCache(config, driver=driver, budget="1MiB") as cache:
        take(cache, 100)
        with pytest.raises(vattn.OutOfBudget, match="larger budget="):
            for _ in range(30):
                take(cache, 100)
                assert cache.bytes_held() <= 1 << 20
        # The parts stay, whoever finds another cache for more rows.
        cache.reset()
        assert sum(group.budget for group in cache.groups) <= 1 << 20
        cache.crop(0)
        for layer in range(4):
            states = torch.ones(9, 4 if layer % 2 else 2, 10, 8)
            cache.update(states, states, layer)
        cache.batch_repeat_interleave(2)
        assert cache.groups[0].room == 18
        assert sum(group.budget for group in cache.groups) <= 1 << 20
    with VattnCache(config, driver=driver, budget="256KiB") as cache:
        with pytest.raises(vattn.OutOfBudget, match="are needed at the least"):
            take(cache, 100)
        assert cache.bytes_held() <= 256 << 10


@small_granules
def test_a_refused_allocation_leaves_the_cache_as_it_was(driver: vattn.CheckedDriver) -> None:
    model = make("Llama")
    tokens = prompt(rows=2, tokens=400, padded=False)["input_ids"]
    with VattnCache(model, driver=driver, background="off") as cache:
        first = steps(model, cache, tokens[:, :100])
        driver.fail(1, vattn.OutOfDeviceMemory, verb="create", onward=True)
        with pytest.raises(vattn.OutOfDeviceMemory, match="2 rows of 400 tokens"):
            steps(model, cache, tokens[:, 100:])
        driver.clear_failures()
        assert cache.get_seq_length() == 100
        cache.crop(-100)
        torch.testing.assert_close(steps(model, cache, tokens[:, :100]), first)


def test_what_is_not_supported_is_refused_with_a_sentence(driver: vattn.Driver) -> None:
    model = make("Llama")
    tokens = prompt(padded=False)["input_ids"]
    with VattnCache(model, driver=driver) as cache:
        with pytest.raises(RuntimeError, match="no gradients: call the model under torch.no_grad"):
            model(input_ids=tokens, past_key_values=cache)
        cache.reset()
        with pytest.raises(ValueError, match="a batch of 1 came to a cache that holds 3 rows of 11 tokens"):
            steps(model, cache, tokens)
            steps(model, cache, tokens[:1, :1])
        with pytest.raises(NotImplementedError, match="can't be offloaded"):
            cache.layers[0].offload()
        with pytest.raises(TypeError, match="can't be pickled"):
            cache.__reduce__()
    with pytest.raises(TypeError, match="give a model of transformers, or its config"):
        VattnCache("llama")
    with pytest.raises(TypeError, match="states of torch.float64"):
        steps(model.double(), VattnCache(model), tokens)


def test_a_pass_that_ended_half_way_has_to_go_as_a_whole(driver: vattn.Driver) -> None:
    model = make("Gemma3Text")
    tokens = prompt(rows=1, padded=False)["input_ids"]
    whole = steps(model, own(model), tokens)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    def half(cache: Any, ids: Any) -> None:
        hook = model.model.layers[2].mlp.register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            steps(model, cache, ids)
        hook.remove()

    with VattnCache(model, driver=driver) as cache:
        half(cache, tokens[:, :4])
        with pytest.raises(RuntimeError, match="comes for the first time, and others hold 4 tokens"):
            steps(model, cache, tokens[:, 4:6])
        cache.reset()
        steps(model, cache, tokens[:, :4])
        half(cache, tokens[:, 4:7])
        for kept in (0, -2, 5):
            with pytest.raises(RuntimeError, match="from 4 to 7 tokens.*take 3 away at least"):
                cache.crop(kept)
        cache.crop(-3)
        torch.testing.assert_close(steps(model, cache, tokens[:, 4:]), whole[:, 4:], atol=1e-4, rtol=1e-4)


@small_granules
def test_rows_that_find_no_memory_change_nothing(driver: vattn.Driver) -> None:
    model = make("Mistral", sliding_window=600, max_position_embeddings=4096)
    tokens = torch.randint(3, 97, (2, 900))
    with VattnCache(model, driver=driver, budget="4MiB") as cache, VattnCache(model, driver=driver) as larger:
        for past in (cache, larger):
            for at in range(0, 900, 100):
                steps(model, past, tokens[:, at : at + 100])
        with pytest.raises(
            vattn.OutOfBudget, match=r"30 rows of 900 tokens can't be held; give VattnCache a larger"
        ):
            cache.batch_repeat_interleave(15)
        with pytest.raises(IndexError, match="there are 2"):
            cache.reorder_cache(torch.tensor([0, 2, 1]))
        assert [group.rows for group in cache.groups] == [2]
        with pytest.raises(ValueError, match="a batch of 30 came"):
            steps(model, cache, tokens[:1, :1].expand(30, 1))
        torch.testing.assert_close(steps(model, cache, tokens[:, :1]), steps(model, larger, tokens[:, :1]))


def test_rows_that_pytorch_has_no_memory_to_move_change_nothing(
    driver: vattn.Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two groups of layers, of which the second finds none."""
    model = make("Gemma3Text")
    tokens = torch.randint(3, 97, (3, 20))
    with VattnCache(model, driver=driver) as cache, VattnCache(model, driver=driver) as other:
        for past in (cache, other):
            steps(model, past, tokens)
        assert len(cache.groups) == 2
        empty, made = torch.empty, []

        def failing(*shape: Any, **options: Any) -> Any:
            made.append(shape)
            if len(made) == 2:
                raise torch.OutOfMemoryError("no memory for it")
            return empty(*shape, **options)

        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", failing)
            with pytest.raises(torch.OutOfMemoryError):
                cache.reorder_cache(torch.tensor([2, 0, 1]))
        assert len(made) == 2
        torch.testing.assert_close(steps(model, cache, tokens[:, :1]), steps(model, other, tokens[:, :1]))


@small_granules
def test_a_batch_without_addresses_leaves_a_cache_that_works(driver: vattn.Driver) -> None:
    model = make("Llama")
    tokens = prompt(rows=1, padded=False)["input_ids"]
    with VattnCache(model, driver=driver, max_tokens=1 << 33) as cache:
        first = steps(model, cache, tokens)
        cache.reset()
        with pytest.raises(vattn.OutOfAddressSpace, match="give VattnCache a smaller max_tokens="):
            steps(model, cache, tokens.expand(64, -1))
        torch.testing.assert_close(steps(model, cache, tokens), first)


def test_states_of_another_shape_are_refused(driver: vattn.Driver) -> None:
    def states(rows: int, count: int, width: int) -> Any:
        return torch.ones(rows, 4, count, width)

    with VattnCache(transformers.LlamaConfig(**SIZES), driver=driver) as cache:
        cache.update(states(2, 3, 8), states(2, 3, 8), 0)
        for wrong in (states(1, 3, 8), states(2, 1, 8)):
            with pytest.raises(ValueError, match=r"layer 1 came with .* has \[2, 4, 3, 8\]"):
                cache.update(wrong, wrong, 1)
        cache.reset()
        for wrong in (states(2, 3, 1), states(2, 3, 8).half()):
            with pytest.raises(ValueError, match="layer 0 came with .* call close"):
                cache.update(wrong, wrong, 0)
        for wrong in (states(2, 3, 8)[0], states(1, 3, 8)):
            with pytest.raises(TypeError, match="alike but for dim"):
                cache.update(states(2, 3, 8)[: wrong.dim()], wrong, 0)
        cache.update(states(2, 3, 8), states(2, 3, 8), 0)
        with pytest.raises(RuntimeError, match="no gradients"):
            cache.update(states(2, 3, 8).requires_grad_(), states(2, 3, 8), 1)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="SKIP: a child of fork can't use the GPU")
def test_a_child_of_fork_leaves_its_parents_caches_alone(driver: vattn.Driver, capfd: Any) -> None:
    config = transformers.LlamaConfig(**SIZES)
    states = torch.ones(1, 4, 3, 8)
    cache, ended = VattnCache(config, driver=driver), VattnCache(config, driver=driver)
    cache.update(states, states, 0)
    ended.update(states, states, 0)
    seen = ended.update(states, states, 0)
    with pytest.warns(ResourceWarning):
        ended.close()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            del cache, ended, seen
            gc.collect()
            own_cache = VattnCache(config, driver=vattn.HostDriver("16MiB", granule="64KiB"))
            own_cache.update(states, states, 0)
            own_cache.close()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert capfd.readouterr().err == ""
    del seen
    cache.close()
    VattnCache(config, driver=driver).update(states, states, 0)


def test_a_cache_may_be_written_in_and_out_of_inference_mode(driver: vattn.Driver) -> None:
    model = make("Llama")
    tokens = prompt(padded=False)["input_ids"]
    whole = steps(model, own(model), tokens)
    with VattnCache(model, driver=driver) as cache:
        with torch.inference_mode():
            model(input_ids=tokens[:, :4], past_key_values=cache)
        steps(model, cache, tokens[:, 4:8])
        with torch.inference_mode():
            last = model(input_ids=tokens[:, 8:], past_key_values=cache).logits
        torch.testing.assert_close(last, whole[:, 8:], atol=1e-4, rtol=1e-4)


def test_a_closed_cache_begins_anew_and_a_forgotten_one_is_closed(driver: vattn.CheckedDriver) -> None:
    model = make("Llama")
    tokens = prompt(padded=False)["input_ids"]
    cache = VattnCache(model, driver=driver)
    first = steps(model, cache, tokens)
    cache.close()
    cache.close()
    assert driver.live().handles == 0
    assert cache.get_seq_length() == 0
    assert torch.equal(steps(model, cache, tokens), first)
    assert driver.live().handles > 0
    del cache
    gc.collect()
    assert driver.live().handles == 0


def test_a_compiled_model_steps_around_it(driver: vattn.Driver) -> None:
    assert not VattnCache(make("Llama")).is_compileable
    layer = VattnCache(make("Llama"), driver=driver)
    states = torch.ones(1, 4, 1, 8)

    @torch.compile(fullgraph=True, backend="eager")
    def whole() -> Any:
        return layer.update(states, states, 0)

    with pytest.raises(Exception, match="asks a driver for memory"), torch.no_grad():
        whole()


def test_keys_and_values_of_a_token_are_one_write_where_they_are_of_one_width(driver: vattn.Driver) -> None:
    for kind, widths in (("Llama", True), ("DeepseekV3", False)):
        model = make(kind)
        with VattnCache(model, driver=driver) as cache:
            generate(model, cache, prompt(rows=2), max_new_tokens=3)
            group = cache.groups[0]
            assert (group.both is not None) is widths
            if widths:
                keys, values = group.window(0, group.held)
                both = group.both[0, :, :, : group.held]
                assert torch.equal(both, torch.cat((keys[0], values[0])))
                del keys, values, both
