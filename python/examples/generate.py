"""`model.generate()` with a cache that grows in place, beside transformers' own.

python examples/generate.py                     # a tiny model with random weights
python examples/generate.py path/to/a/model     # a model that is on this disk, with its tokenizer
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LlamaConfig, LlamaForCausalLM

from vattn.transformers import VattnCache

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
if len(sys.argv) > 1:
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").to(device).eval()
    prompts = ["Virtual memory is", "The longest river of the world is the"]
    inputs = dict(tokenizer(prompts, return_tensors="pt", padding=True).to(device))
else:
    config = LlamaConfig(
        vocab_size=1000, hidden_size=256, intermediate_size=512, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=4, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device).eval()
    inputs = {"input_ids": torch.randint(1, 1000, (2, 20), device=device)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])

theirs = model.generate(
    **inputs, past_key_values=DynamicCache(config=model.config), max_new_tokens=200, do_sample=False
)
with VattnCache(model) as cache:
    ours = model.generate(**inputs, past_key_values=cache, max_new_tokens=200, do_sample=False)
    print(f"{ours.shape[0]} answers, {ours.shape[1]} tokens each with their prompts, on {device}")
    print(f"the cache holds {cache.bytes_held() / 2**20:.2f} MiB for {cache.get_seq_length()} tokens a row")
    print(f"the same tokens as with DynamicCache: {torch.equal(ours, theirs)}")

    # The conversation goes on: only the new tokens are computed.
    more = torch.cat([ours, ours[:, :5]], dim=1)
    longer = model.generate(
        more, attention_mask=torch.ones_like(more), past_key_values=cache, max_new_tokens=50, do_sample=False
    )
    print(f"and went on to {longer.shape[1]} tokens; beams work in place, too:")

with VattnCache(model, budget="1GiB") as cache:
    beams = model.generate(**inputs, past_key_values=cache, max_new_tokens=30, num_beams=4, do_sample=False)
    print(
        f"4 beams, {beams.shape[1]} tokens, {cache.bytes_held() / 2**20:.2f} MiB; all of it is given back now"
    )
if len(sys.argv) > 1:
    print(tokenizer.batch_decode(ours, skip_special_tokens=True)[0])
