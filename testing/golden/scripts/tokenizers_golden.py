"""Writes testing/golden/tokenizers: small GGUF models and tokenizer.json files with the token ids they must give.

Tokenizers are trained here on text of our own; the GGUF files are written by the `gguf` package. Expected ids come from
the Hugging Face `tokenizers` library, from `sentencepiece` and from llama.cpp (`llama-cpp-python`, vocabulary only).
Where two of them disagree the file says so, and the Rust tests know which one is followed.

Needs: pip install numpy gguf tokenizers sentencepiece llama-cpp-python
"""

import io
import json
import pathlib

import gguf
import llama_cpp
import numpy
import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tokenizer_texts import CORPUS, TEXTS

OUTPUT = pathlib.Path(__file__).parent.parent / "tokenizers"
CONTROL = ["<|begin|>", "<|end|>", "<|user|>"]
USER_DEFINED = ["[tool]"]

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = GPT4O.replace(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "").replace(r"\p{N}{1,3}", r"\p{N}")
DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"""
    r""" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)


def split(*patterns):
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
# For each name in GGUF files the steps in Hugging Face's terms, as the tokenizer.json of such models has them.
PRE_TOKENIZERS = {
    "llama-bpe": split(LLAMA3),
    "qwen2": split(QWEN2),
    "gpt-2": [GPT2],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), GPT2],
    "tekken": split(TEKKEN),
    "gpt-4o": split(GPT4O),
    "falcon": [pre_tokenizers.Punctuation("contiguous"), GPT2, pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated")],
    "deepseek-v3": split(r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK3),
    "deepseek-coder": split(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}"),
    "deepseek-llm": None,
    "default": None,
}
WHOLE_WORDS_FIRST = {"llama-bpe", "tekken"}


def train(steps, whole_words_first, vocabulary=700):
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole_words_first))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in CONTROL],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in USER_DEFINED])
    return tokenizer


def write_gguf(path, tokens, fields):
    """A complete model of one layer with random weights, so that every reader can open it."""
    random = numpy.random.default_rng(7)
    width, inner = 8, 16
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width)
    writer.add_vocab_size(len(tokens))
    fields(writer)
    matrices = {"token_embd": (len(tokens), width)}
    for name, shape in {
        "attn_q": (width, width), "attn_k": (width, width), "attn_v": (width, width), "attn_output": (width, width),
        "ffn_gate": (inner, width), "ffn_up": (inner, width), "ffn_down": (width, inner),
    }.items():
        matrices[f"blk.0.{name}"] = shape
    for name, shape in matrices.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape).astype(numpy.float16))
    for name in ["output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"]:
        writer.add_tensor(f"{name}.weight", numpy.ones(width, dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_bpe(path, tokenizer, pre):
    ids = tokenizer.get_vocab(with_added_tokens=True)
    tokens = [token for token, _ in sorted(ids.items(), key=lambda item: item[1])]
    types = [3 if token in CONTROL else 4 if token in USER_DEFINED else 1 for token in tokens]
    merges = [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]

    def fields(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges(merges)
        writer.add_bos_token_id(ids["<|begin|>"])
        writer.add_eos_token_id(ids["<|end|>"])
        writer.add_add_bos_token(False)

    write_gguf(path, tokens, fields)


def train_sentencepiece():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in CORPUS for line in text.splitlines()),
        model_writer=model, model_type="bpe", vocab_size=900, byte_fallback=True, character_coverage=0.98,
        normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        allow_whitespace_only_pieces=True, user_defined_symbols=USER_DEFINED, control_symbols=CONTROL,
        hard_vocab_limit=False, num_threads=1, minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def write_sentencepiece(path, model):
    size = model.get_piece_size()
    tokens = [model.id_to_piece(index) for index in range(size)]

    def kind(index):
        if model.is_byte(index):
            return 6
        if model.is_unknown(index):
            return 2
        if model.is_control(index):
            return 3
        return 4 if tokens[index] in USER_DEFINED else 1

    def fields(writer):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_scores([model.get_score(index) for index in range(size)])
        writer.add_token_types([kind(index) for index in range(size)])
        writer.add_bos_token_id(model.bos_id())
        writer.add_eos_token_id(model.eos_id())
        writer.add_unk_token_id(model.unk_id())
        writer.add_add_bos_token(True)

    write_gguf(path, tokens, fields)


def hugging_face_of_sentencepiece(model):
    """The same vocabulary as a tokenizer.json in the layout of Llama 2."""
    pieces = {model.id_to_piece(index): index for index in range(model.get_piece_size())}
    merges = []
    for piece, index in pieces.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in pieces and right in pieces and not model.is_control(index):
                merges.append((index, pieces[left], pieces[right], left, right))
    merges.sort(key=lambda merge: merge[:3])
    tokenizer = Tokenizer(models.BPE(
        vocab=pieces, merges=[(left, right) for *_, left, right in merges], unk_token="<unk>", fuse_unk=True,
        byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in ["<unk>", "<s>", "</s>", *CONTROL]])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in USER_DEFINED])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", pieces["<s>"])])
    return tokenizer


def llama_ids(path, add_special=False):
    model = llama_cpp.Llama(model_path=str(path), vocab_only=True, verbose=False)
    return [model.tokenize(text.encode(), add_bos=add_special, special=True) for text in TEXTS]


def save(name, **kinds):
    differing = []
    if "hugging_face" in kinds and "llama_cpp" in kinds:
        pairs = zip(kinds["hugging_face"], kinds["llama_cpp"])
        differing = [index for index, (ours, theirs) in enumerate(pairs) if ours != theirs]
    print(f"{name}: {len(TEXTS)} texts, differing {differing}")
    (OUTPUT / f"{name}.json").write_text(json.dumps({**kinds, "differing": differing}, separators=(",", ":")) + "\n")


def main():
    OUTPUT.mkdir(exist_ok=True)
    (OUTPUT / "texts.json").write_text(json.dumps(TEXTS, indent=0) + "\n")
    for pre, steps in PRE_TOKENIZERS.items():
        tokenizer = train(steps or [GPT2], pre in WHOLE_WORDS_FIRST)
        path = OUTPUT / f"{pre}.gguf"
        write_bpe(path, tokenizer, pre)
        kinds = {"llama_cpp": llama_ids(path)}
        if steps:
            kinds["hugging_face"] = [tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]
            kinds["decoded"] = [tokenizer.decode(ids) for ids in kinds["hugging_face"]]
        save(pre, **kinds)
        if pre == "smollm":
            tokenizer.save(str(OUTPUT / "byte-level.tokenizer.json"), pretty=False)

    model = train_sentencepiece()
    path = OUTPUT / "sentencepiece.gguf"
    write_sentencepiece(path, model)
    tokenizer = hugging_face_of_sentencepiece(model)
    tokenizer.save(str(OUTPUT / "sentencepiece.tokenizer.json"), pretty=False)
    ids = [tokenizer.encode(text, add_special_tokens=True).ids for text in TEXTS]
    save("sentencepiece", llama_cpp=llama_ids(path, add_special=True), hugging_face=ids,
         sentencepiece=[[model.bos_id(), *model.encode(text)] for text in TEXTS],
         decoded=[tokenizer.decode(line) for line in ids])


if __name__ == "__main__":
    main()
