"""What the reference model can do, exact attention (transformers): LongEval-style lines generated at any count,
the published LongEval cases, and text loss by context length.

    python check_reference.py MODEL_DIR [--lines 20,50,100,200] [--cases FILE.jsonl ...] [--text FILE.txt]
"""
import argparse, json, random, re, sys
import torch
from transformers import AutoModelForCausalLM
from tokenizers import Tokenizer
ap = argparse.ArgumentParser(); ap.add_argument("model"); ap.add_argument("--lines", default="10,20,50,100,200"); ap.add_argument("--cases", nargs="*", default=[])
ap.add_argument("--text"); ap.add_argument("--count", type=int, default=20); ap.add_argument("--topk", type=int, default=0)
a = ap.parse_args(); torch.set_num_threads(2)
m = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32, attn_implementation="sdpa").eval(); tok = Tokenizer.from_file(a.model + "/tokenizer.json")
enc = lambda s: tok.encode(s, add_special_tokens=False).ids
ADJ = "brave quiet rusty tall eager mellow proud silly tiny vast gentle jolly witty noble sharp bitter crisp dusty frosty golden hollow lucky misty nasty polite rapid shiny tender upbeat wild".split()
NOUN = "river table candle garden window ladder pocket ribbon saddle turnip violin wagon anchor basket cactus dragon engine feather goblin hammer island jacket kettle lantern magnet needle orchid parrot quiver rocket".split()
from importlib import util
src = open(__file__.replace("check_reference.py", "train_reference.py")).read(); INTRO = eval(re.search(r'INTRO = (\(.*?\))\n', src, re.S).group(1)); ASK = re.search(r'ASK = "(.*?)"\n', src).group(1)
@torch.no_grad()
def answer(prompt, key, want):
    ids = enc(prompt + f"\nThe <REGISTER_CONTENT> in line {key} is <"); y = enc(want)
    lg = m(torch.tensor([ids + y])).logits[0, len(ids) - 1:len(ids) - 1 + len(y)]
    return bool((lg.argmax(-1) == torch.tensor(y)).all()), len(ids)
rng = random.Random(7)
for n in map(int, a.lines.split(",")):
    hit = length = 0
    for _ in range(a.count):
        keys = rng.sample([x + "-" + y for x in ADJ for y in NOUN], n); vals = [str(rng.randint(1, 50000)) for _ in keys]
        body = "".join(f"line {k}: REGISTER_CONTENT is <{v}>\n" for k, v in zip(keys, vals)); i = rng.randrange(n)
        h, length = answer("<|endoftext|>" + INTRO + body + "\n" + ASK.format(k=keys[i]), keys[i], vals[i]); hit += h
    print(f"lines {n}: {hit}/{a.count} at {length} tokens", flush=True)
for f in a.cases:
    hit = total = length = 0
    for l in open(f).read().splitlines()[:a.count]:
        c = json.loads(l); key = c["random_idx"][0]; h, length = answer("<|endoftext|>" + c["prompt"], key, str(c["expected_number"])); hit += h; total += 1
    print(f"{f.split('/')[-1]}: {hit}/{total} at {length} tokens", flush=True)
if a.text:
    ids = enc(open(a.text).read())[:8193]; x = torch.tensor([ids])
    with torch.no_grad(): ce = torch.nn.functional.cross_entropy(m(x[:, :-1]).logits[0], x[0, 1:], reduction="none")
    for lo, hi in [(0, 128), (128, 512), (512, 1024), (1024, 2048), (2048, 4096), (4096, 8192)]: print(f"text loss at {lo}-{hi}: {ce[lo:hi].mean():.3f} nats/token")
