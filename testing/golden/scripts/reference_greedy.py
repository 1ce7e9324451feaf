"""Greedy text of the reference model under transformers (f32): testing/golden/reference/greedy.json.

    python testing/golden/scripts/reference_greedy.py examples/texts/milly_and_olly.txt

Three prompts of 900 characters are continued by 200 tokens each. `smallest_margin` is the
least distance between the two highest logits on the way: prompts were chosen where it is well above the rounding of
bfloat16 products.
"""
import json
import pathlib
import sys

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

ROOT = pathlib.Path(__file__).resolve().parents[3]
MODEL = ROOT / "models" / "reference"
OFFSETS = [241781, 200730, 43478]
TOKENS = 200

model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="sdpa").eval()
tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
text = open(sys.argv[1], encoding="utf8").read()
cases = []
for offset in OFFSETS:
    prompt = text[offset : offset + 900]
    prompt_tokens = tokenizer.encode(prompt, add_special_tokens=False).ids
    tokens, margins = [], []
    with torch.no_grad():
        output = model(torch.tensor([prompt_tokens]), use_cache=True)
        for _ in range(TOKENS):
            best = output.logits[0, -1].topk(2)
            tokens.append(best.indices[0].item())
            margins.append((best.values[0] - best.values[1]).item())
            output = model(torch.tensor([tokens[-1:]]), past_key_values=output.past_key_values, use_cache=True)
    cases.append(dict(prompt=prompt, prompt_tokens=prompt_tokens, tokens=tokens, smallest_margin=round(min(margins), 4)))
folder = ROOT / "testing" / "golden" / "reference"
folder.mkdir(exist_ok=True)
(folder / "greedy.json").write_text(json.dumps(cases, ensure_ascii=False, indent=None, separators=(",", ":")) + "\n")
