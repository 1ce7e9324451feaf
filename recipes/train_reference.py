"""Train the reference language model: a small Llama (Hugging Face layout) that reads long contexts.

    python train_reference.py --books books-train.txt.xz --out OUT --minutes 8.3 --device cuda --workers 14 \
        --dim 384 --layers 8 --heads 6 --kv-heads 2 --ffn 1024 --vocab 4096 --tokens 32768 --lr 1e-3 \
        --stages 0:512,0.12:1024,0.25:2048,0.4:4096,0.55:8192,0.75:16384                              # one H100
    python train_reference.py --books books-train.txt.xz --out OUT --minutes 90                      # two CPU cores

Data: public-domain books mixed with generated recall tasks (tables of keys and values in several
wordings, needles in text, repeated spans). The words of the tasks come from the books, never from a
benchmark's word list. Positions are skip-wise (PoSE, arXiv 2309.10400) so that distances up to
--max-position are seen. OUT gets config.json, model.safetensors (bf16), tokenizer.json, log.jsonl,
and state.pt (optimizer and step, for --resume; not to be kept).
"""
import argparse, functools, json, lzma, math, os, random, re, time
import numpy as np, torch, torch.nn as nn, torch.nn.functional as F

ap = argparse.ArgumentParser()
ap.add_argument("--books"); ap.add_argument("--out"); ap.add_argument("--minutes", type=float, default=90)
ap.add_argument("--device", default="cpu"); ap.add_argument("--dim", type=int, default=256)
ap.add_argument("--layers", type=int, default=4); ap.add_argument("--heads", type=int, default=4)
ap.add_argument("--kv-heads", type=int, default=2); ap.add_argument("--ffn", type=int, default=704)
ap.add_argument("--vocab", type=int, default=2048); ap.add_argument("--tokens", type=int, default=4096, help="tokens per step")
ap.add_argument("--theta", type=float, default=500000.0); ap.add_argument("--max-position", type=int, default=65536)
ap.add_argument("--stages", default="0:128,0.2:256,0.4:512,0.6:1024,0.8:2048,0.93:4096", help="share of the run : sequence length")
ap.add_argument("--lr", type=float, default=7e-4); ap.add_argument("--seed", type=int, default=1)
ap.add_argument("--threads", type=int, default=2); ap.add_argument("--workers", type=int, default=0)
ap.add_argument("--eager", action="store_true", help="no torch.compile on a GPU"); ap.add_argument("--init", help="folder of a trained model to start from (its tokenizer too)"); ap.add_argument("--resume", action="store_true"); ap.add_argument("--stop-after", type=float, default=1e9, help="minutes of this call")
a = ap.parse_args()
HEAD, SPECIAL = 64, ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"]
os.makedirs(a.out, exist_ok=True)

INTRO = ("Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and contains a "
         "'<REGISTER_CONTENT>' at the end of the line as a numerical value. For each line index, memorize its corresponding "
         "<REGISTER_CONTENT>. At the end of the record, I will ask you to retrieve the corresponding <REGISTER_CONTENT> of a "
         "certain line index. Now the record start:\n\n")
ASK = "Now the record is over. Tell me what is the <REGISTER_CONTENT> in line {k}? I need the number. "
NEEDLE = "One of the special magic numbers for {k} is: {v}."
NASK = "What is the special magic number for {k} mentioned in the provided text? The special magic number for {k} mentioned in the provided text is: "
TEMPLATES = ["{k}: {v}\n", "line {k}: <{v}>\n", "The number of {k} is {v}.\n", "line {k}: REGISTER_CONTENT is <{v}>\n"]


class Data:
    """Makes (ids, loss weights) of one sequence. Weights: 2.0 and 1.9 answers, 1.8 needles, 1.5 repeated spans, 1.0 text."""

    def __init__(s, out, seed, level):
        s.level = level
        from tokenizers import Tokenizer
        s.tok = Tokenizer.from_file(os.path.join(out, "tokenizer.json"))
        s.books = np.load(os.path.join(out, "books.npy"), mmap_mode="r")
        s.words = json.load(open(os.path.join(out, "words.json")))
        s.rng = random.Random(seed); s.progress = 0.0
        s.piece = functools.lru_cache(None)(lambda t: s.tok.encode(t, add_special_tokens=False).ids)
        s.split = re.compile(r"[0-9]| ?[A-Za-z]+| ?[^\sA-Za-z0-9]+|\s+(?![^\s0-9])|\s+")

    def enc(s, text):
        """Token ids, piece by piece (cached): the pieces end where the tokenizer always splits."""
        return [i for p in s.split.findall(text) for i in s.piece(p)]

    def grown(s, start, full, by): return int(start * (full / start) ** min(1.0, max(s.progress / by, s.level.value / 8)))
    def word(s): return s.words[s.rng.randrange(s.grown(48, len(s.words), 0.35))]
    def key(s): return s.word() + "-" + s.word()
    def book(s, n):
        i = s.rng.randrange(len(s.books) - n - 1); return s.books[i:i + n].tolist()

    # One row of a table: (key of one or two words, value a word or a number, wording). A level opens when the one before is learned.
    LEVELS = [(1, "word", "{k} {v}\n"), (1, "word", "{k}: {v}\n"), (1, "digit", "{k} {v}\n"), (1, "digit", "{k}: {v}\n"), (1, "number", "{k}: {v}\n"), (1, "number", "line {k}: <{v}>\n"),
              (2, "number", "line {k}: <{v}>\n"), (2, "number", "The number of {k} is {v}.\n"), (2, "number", "line {k}: value is <{v}>\n"), (2, "number", TEMPLATES[3])]

    def table(s, n):
        """Keys and values, then questions about them. Weight 2.0 marks answers of the newest level, 1.9 of older ones."""
        r = s.rng; newest = s.level.value; level = newest if r.random() < 0.6 else r.randint(0, newest)
        words, kind, t = s.LEVELS[level]; register = t is TEMPLATES[3]; head, tail = t.split("{v}"); z = s.enc(tail); ids, w = [0], [0.0]
        if register and n >= 512 and r.random() < 0.6: x = s.enc(INTRO); ids += x; w += [0.0] * len(x)
        space = " " if kind == "word" and head.endswith(" ") else ""; head = head[:len(head) - len(space)]
        value = {"word": lambda: space + s.word(), "digit": lambda: str(r.randint(0, 9)), "number": lambda: str(r.randint(1, r.choice([99, 999, 50000, 50000])))}[kind]
        answers = min(64, max(4, n // 60)); budget = max(n // 2, n - answers * (40 if register else 20)); rows = {}
        while len(ids) < budget or len(rows) < 3:
            k, v = (s.word() if words == 1 else s.key()), value(); rows[k] = v
            x = s.enc(head.format(k=k)) + s.enc(v) + z; ids += x; w += [0.0] * len(x)
        ks = list(rows); short = not register or r.random() < 0.5; mark = 2.0 if level == newest else 1.9
        while len(ids) < n + 1:
            k = r.choice(ks)
            x = s.enc(head.format(k=k) if short else "\n" + ASK.format(k=k) + f"\nThe <REGISTER_CONTENT> in line {k} is <"); y = s.enc(rows[k])
            ids += x + y + z; w += [0.0] * len(x) + [mark] * len(y) + [0.1] * len(z)
        return ids, w

    def needles(s, n):
        r = s.rng; m = r.randint(1, 6); rows = [(s.key() if r.random() < .7 else s.word(), str(r.randint(10000, 9999999))) for _ in range(m)]
        tail, tw = [], []
        for k, v in r.sample(rows, r.randint(1, m)):
            x, y = s.enc("\n" + NASK.format(k=k)), s.enc(v); tail += x + y + s.enc(".\n"); tw += [0.0] * len(x) + [1.8] * len(y); tw += [0.1] * (len(tail) - len(tw))
        body = s.book(max(16, n + 1 - len(tail) - 40 * m)); w = [0.5] * len(body)
        for k, v in rows:
            x = s.enc(" " + NEEDLE.format(k=k, v=v)); p = r.randrange(len(body)); body[p:p] = x; w[p:p] = [0.0] * len(x)
        return body + tail, w + tw

    def repeat(s, n):
        r = s.rng; top = s.grown(40, a.vocab - 300, 0.25); draw = lambda m: [300 + r.randrange(top) for _ in range(m)]
        k = r.randint(16, max(17, n // 3)); span = draw(k) if r.random() < .7 else s.book(k)
        rest = max(2, n + 1 - 2 * k); gap, gw = (draw(rest), 0.0) if r.random() < .6 else (s.book(rest), 0.3)
        c = r.randrange(rest); d = c + (rest - c) // 2
        return gap[:c] + span + gap[c:d] + span + gap[d:], [gw] * c + [0.0] * (k + 0) + [gw] * (d - c) + [0.0] + [1.5] * (k - 1) + [gw] * (rest - d)

    def sample(s, n):
        r = s.rng.random()
        if r < 0.2: ids = s.book(n + 1); w = [1.0] * len(ids)
        elif r < 0.75: ids, w = s.table(n)
        elif r < (0.78 if s.level.value < 7 else 0.92): ids, w = s.needles(n)
        else: ids, w = s.repeat(n)
        return (ids + [0] * (n + 1))[:n + 1], (w + [0.0] * (n + 1))[:n + 1]

    def positions(s, n):
        """Skip-wise positions: train on n tokens, see distances up to max_position."""
        p = np.arange(n)
        if s.rng.random() < 0.5:
            span = int(math.exp(s.rng.uniform(math.log(n + 1), math.log(a.max_position))))
            for c in sorted(s.rng.sample(range(1, n), s.rng.randint(1, 4))): p[c:] += s.rng.randint(0, max(0, span - n) // 3)
        return np.minimum(p, a.max_position - 1)

    def batch(s, n, b):
        xs, ws, ps = zip(*[(*s.sample(n), s.positions(n)) for _ in range(b)])
        return torch.tensor(np.array(xs)), torch.tensor(np.array(ws), dtype=torch.float32), torch.tensor(np.array(ps))


def length_at(progress): return [n for f, n in [(float(x.split(":")[0]), int(x.split(":")[1])) for x in a.stages.split(",")] if progress >= f][-1]

class Stream(torch.utils.data.IterableDataset):
    """Batches for the stage the clock says; each worker has its own seed."""
    def __init__(s, start, level): s.start, s.level = start, level
    def __iter__(s):
        info = torch.utils.data.get_worker_info()
        data = Data(a.out, [a.seed, int(time.time() * 1000), info.id if info else 0].__repr__(), s.level)
        while True:
            data.progress = (time.time() - s.start) / 60 / a.minutes
            n = min(length_at(min(data.progress, 0.9999)), 128 if s.level.value < 5 else 256 if s.level.value < 9 else 1 << 20); yield data.batch(n, max(1, a.tokens // n))


def prepare():
    """Tokenizer, word list and token ids of the books, made once."""
    from tokenizers import Tokenizer, models, pre_tokenizers, decoders, trainers
    if os.path.exists(os.path.join(a.out, "words.json")): return
    rng = random.Random(a.seed)
    text = (lzma.open(a.books, "rt", encoding="utf8", errors="ignore") if a.books.endswith(".xz") else open(a.books, encoding="utf8", errors="ignore")).read()
    words = sorted(set(re.findall(r"\b[a-z]{4,9}\b", text[:20_000_000]))); rng.shuffle(words)
    key = lambda: rng.choice(words) + "-" + rng.choice(words)
    if a.init: tok = Tokenizer.from_file(os.path.join(a.init, "tokenizer.json"))
    else: tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tok.decoder = decoders.ByteLevel()
    def corpus():
        for i in range(0, min(len(text), 40_000_000), 10_000): yield text[i:i + 10_000]
        for _ in range(300): yield INTRO + "\n".join(TEMPLATES[3].format(k=key(), v=rng.randint(1, 50000)) for _ in range(20)) + ASK.format(k=key()) + NEEDLE.format(k=key(), v=1) + NASK.format(k=key())
    if not a.init: tok.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=a.vocab, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tok.save(os.path.join(a.out, "tokenizer.json"))
    parts = [text[i:i + 200_000] for i in range(0, min(len(text), 100_000_000), 200_000)]
    np.save(os.path.join(a.out, "books.npy"), np.concatenate([np.array(e.ids, np.uint16) for e in tok.encode_batch(parts)]))
    words.sort(key=lambda w: len(tok.encode(" " + w).ids))  # whole-token words first: the curriculum starts with them
    json.dump(words, open(os.path.join(a.out, "words.json"), "w"))


class Norm(nn.Module):
    def __init__(s, d): super().__init__(); s.weight = nn.Parameter(torch.ones(d))
    def forward(s, x): return F.rms_norm(x, (x.shape[-1],), s.weight.to(x.dtype), 1e-5)
lin = lambda i, o: nn.Linear(i, o, bias=False)
class Attention(nn.Module):
    def __init__(s):
        super().__init__(); s.q_proj = lin(a.dim, a.heads * HEAD); s.k_proj = lin(a.dim, a.kv_heads * HEAD); s.v_proj = lin(a.dim, a.kv_heads * HEAD); s.o_proj = lin(a.heads * HEAD, a.dim)
    def forward(s, x, cos, sin):
        b, n, _ = x.shape; split = lambda t, h: t.view(b, n, h, HEAD).transpose(1, 2)
        q, k, v = split(s.q_proj(x), a.heads), split(s.k_proj(x), a.kv_heads), split(s.v_proj(x), a.kv_heads)
        def rope(t): t1, t2 = t.chunk(2, -1); return t * cos + torch.cat((-t2, t1), -1) * sin
        q, k, g = rope(q), rope(k), a.heads // a.kv_heads
        o = F.scaled_dot_product_attention(q, k.repeat_interleave(g, 1), v.repeat_interleave(g, 1), is_causal=True)
        return s.o_proj(o.transpose(1, 2).reshape(b, n, -1))
class MLP(nn.Module):
    def __init__(s): super().__init__(); s.gate_proj = lin(a.dim, a.ffn); s.up_proj = lin(a.dim, a.ffn); s.down_proj = lin(a.ffn, a.dim)
    def forward(s, x): return s.down_proj(F.silu(s.gate_proj(x)) * s.up_proj(x))
class Block(nn.Module):
    def __init__(s): super().__init__(); s.self_attn = Attention(); s.mlp = MLP(); s.input_layernorm = Norm(a.dim); s.post_attention_layernorm = Norm(a.dim)
    def forward(s, x, c, i): x = x + s.self_attn(s.input_layernorm(x), c, i); return x + s.mlp(s.post_attention_layernorm(x))
class Body(nn.Module):
    def __init__(s): super().__init__(); s.embed_tokens = nn.Embedding(a.vocab, a.dim); s.layers = nn.ModuleList(Block() for _ in range(a.layers)); s.norm = Norm(a.dim)
class Model(nn.Module):
    """Hugging Face Llama naming and rotary convention, tied output."""
    def __init__(s):
        super().__init__(); s.model = Body()
        for name, p in s.named_parameters():
            if p.dim() == 2: nn.init.normal_(p, std=0.02 if "embed" in name else p.shape[1] ** -0.5)
            if name.endswith(("o_proj.weight", "down_proj.weight")): nn.init.normal_(p, std=p.shape[1] ** -0.5 / (2 * a.layers) ** 0.5)
        s.register_buffer("inv", a.theta ** -(torch.arange(0, HEAD, 2).float() / HEAD), persistent=False)
    def forward(s, x, pos):
        f = pos[..., None].float() * s.inv; f = torch.cat((f, f), -1)[:, None]; cos, sin = f.cos().bfloat16(), f.sin().bfloat16()
        h = s.model.embed_tokens(x).bfloat16()
        for l in s.model.layers: h = l(h, cos, sin)
        return s.model.norm(h)
    def logits(s, h): return h @ s.model.embed_tokens.weight.to(h.dtype).t()

def save(m):
    from safetensors.torch import save_file
    save_file({k: v.detach().float().cpu().bfloat16().contiguous() for k, v in m.state_dict().items()}, os.path.join(a.out, "model.safetensors"), metadata={"format": "pt"})
    json.dump(dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=a.dim, intermediate_size=a.ffn, num_hidden_layers=a.layers,
        num_attention_heads=a.heads, num_key_value_heads=a.kv_heads, head_dim=HEAD, hidden_act="silu", rms_norm_eps=1e-5, rope_theta=a.theta, vocab_size=a.vocab,
        max_position_embeddings=a.max_position, tie_word_embeddings=True, attention_bias=False, mlp_bias=False, bos_token_id=0, eos_token_id=0, dtype="bfloat16"),
        open(os.path.join(a.out, "config.json"), "w"), indent=1)


def main():
    torch.set_num_threads(a.threads); torch.manual_seed(a.seed); prepare()
    m = Model().to(a.device); print("parameters", sum(p.numel() for p in m.parameters()), flush=True)
    mats = [p for n, p in m.named_parameters() if p.dim() == 2 and "embed" not in n]; rest = [p for n, p in m.named_parameters() if not (p.dim() == 2 and "embed" not in n)]
    opt = torch.optim.AdamW([dict(params=mats, weight_decay=0.05), dict(params=rest, weight_decay=0.0)], lr=a.lr, betas=(0.9, 0.98))
    step = seen = level0 = 0; spent = 0.0; state = os.path.join(a.out, "state.pt")
    if a.init:
        from safetensors.torch import load_file
        m.load_state_dict(load_file(os.path.join(a.init, "model.safetensors"))); level0 = len(Data.LEVELS) - 1
    if a.resume and os.path.exists(state):
        st = torch.load(state, map_location=a.device, weights_only=True); m.load_state_dict(st["model"]); opt.load_state_dict(st["opt"]); step, seen, spent = st["step"], st["seen"], st["spent"]; level0 = st.get("level", 0)
    began = time.time(); start = began - spent; saved = began
    level = torch.multiprocessing.Value("i", level0); learned = 0.0
    loader = iter(torch.utils.data.DataLoader(Stream(start, level), batch_size=None, num_workers=a.workers, prefetch_factor=4 if a.workers else None, pin_memory=a.device != "cpu"))
    fwd = torch.compile(lambda x, pos, keep: m.logits(m(x, pos).flatten(0, 1)[keep]), dynamic=True) if a.device != "cpu" and not a.eager else (lambda x, pos, keep: m.logits(m(x, pos).flatten(0, 1)[keep]))
    log = open(os.path.join(a.out, "log.jsonl"), "a")
    while (progress := (time.time() - start) / 60 / a.minutes) < 1 and (time.time() - began) / 60 < a.stop_after:
        for g in opt.param_groups: g["lr"] = a.lr * min(1, (step + 1) / 200) * (1 if progress < 0.5 else max(0.03, (1 - progress) / 0.5))
        t, w, pos = (z.to(a.device, non_blocking=True) for z in next(loader))
        w = w[:, 1:].flatten(); keep = w.nonzero().squeeze(1); wk = w[keep]; y = t[:, 1:].flatten()[keep]
        with torch.autocast(a.device, torch.bfloat16): lg = fwd(t[:, :-1], pos, keep)
        ce = F.cross_entropy(lg.float(), y, reduction="none"); loss = (ce * wk).sum() / wk.sum()
        loss.backward(); torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0); opt.step(); opt.zero_grad(set_to_none=True)
        step += 1; seen += pos.numel()
        if (wk == 2.0).any():
            learned = 0.98 * learned + 0.02 * (lg.argmax(-1) == y)[wk == 2.0].float().mean().item()
            if learned > 0.9 and level.value < len(Data.LEVELS) - 1: level.value += 1; learned = 0.0; print("level", level.value, "at step", step, flush=True)
        if step % 50 == 0:
            ok = (lg.argmax(-1) == y).float(); mean = lambda v, k: round(v[wk == k].mean().item(), 4) if (wk == k).any() else None
            r = dict(step=step, n=pos.shape[1], min=round((time.time() - start) / 60, 2), loss=round(loss.item(), 4), answer_ce=mean(ce, 2.0), answer_hit=mean(ok, 2.0), level=level.value, learned=round(learned, 3), needle_hit=mean(ok, 1.8), repeat_hit=mean(ok, 1.5), text_ce=mean(ce, 1.0), tok_s=round(seen / (time.time() - start)))
            print(r, flush=True); log.write(json.dumps(r) + "\n"); log.flush()
        if time.time() - saved > 240:
            save(m); torch.save(dict(model=m.state_dict(), opt=opt.state_dict(), step=step, seen=seen, spent=time.time() - start, level=level.value), state); saved = time.time()
    save(m); torch.save(dict(model=m.state_dict(), opt=opt.state_dict(), step=step, seen=seen, spent=time.time() - start, level=level.value), state)
    print("done", step, seen, flush=True)

if __name__ == "__main__": main()
