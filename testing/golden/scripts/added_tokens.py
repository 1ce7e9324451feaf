"""Writes testing/golden/tokenizers/added_tokens.json: folders whose tokenizer.json lacks tokens that the files beside it
name, and the token ids that transformers gives to texts with them.

Needs: pip install transformers
"""

import json
import pathlib
import tempfile

from transformers import PreTrainedTokenizerFast

GOLDEN = pathlib.Path(__file__).parent.parent / "tokenizers"
TEXTS = [
    "<|im_start|>user\nThe ships<|im_end|>\n<|im_start|>assistant\n",
    "a  <|im_end|>  b [tool] c<|end|>",
    "ship ships the the",
    "x<tool_call> y </tool_call>",
    "<pad><image>the",
]
FLAGS = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}


def added(content, special=True, **flags):
    return {"content": content, **FLAGS, "special": special, **flags}


def main():
    base = GOLDEN / "byte-level.tokenizer.json"
    size = len(PreTrainedTokenizerFast(tokenizer_file=str(base)))
    listed = {str(size): added("<|im_end|>"), str(size + 1): added("<|im_start|>")}
    cases = {
        "nothing beside": {},
        "listed in the configuration": {"tokenizer_config.json": {"eos_token": "<|im_end|>", "added_tokens_decoder": listed}},
        "listed, with flags": {
            "tokenizer_config.json": {
                "added_tokens_decoder": {
                    str(size): added("<|im_end|>", lstrip=True, rstrip=True),
                    "9": added("ship", special=False, single_word=True),
                    str(size + 1): {"content": "<tool_call>"},
                },
            },
        },
        "a listed token of the vocabulary": {"tokenizer_config.json": {"added_tokens_decoder": {"7": added("ship")}}},
        "other flags than in tokenizer.json": {
            "tokenizer_config.json": {"added_tokens_decoder": {str(size - 1): added("[tool]", lstrip=True)}},
        },
        "named only": {
            "tokenizer_config.json": {
                "pad_token": "<pad>", "eos_token": {"__type": "AddedToken", **added("<|im_end|>", rstrip=True)},
                "image_token": "<image>", "bos_token": None, "add_bos_token": False,
            },
        },
        "additional special tokens": {
            "tokenizer_config.json": {"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "[tool]"]},
        },
        "extra special tokens": {
            "tokenizer_config.json": {
                "additional_special_tokens": ["<pad>"],
                "extra_special_tokens": ["<tool_call>", {"__type": "AddedToken", **added("<image>", rstrip=True)}],
            },
        },
        "extra special tokens with names": {
            "tokenizer_config.json": {"extra_special_tokens": {"tool": "<tool_call>", "picture": "<image>"}},
        },
        "the older file": {
            "tokenizer_config.json": {"eos_token": "<|im_end|>"},
            "added_tokens.json": {"<tool_call>": size + 2, "<|im_end|>": size + 1, "<|im_start|>": size},
        },
        "the older files alone": {
            "special_tokens_map.json": {"eos_token": added("<|im_end|>", rstrip=True), "pad_token": "<pad>"},
            "added_tokens.json": {"<|im_start|>": size},
        },
        "the older files beside a list": {
            "tokenizer_config.json": {"added_tokens_decoder": listed},
            "special_tokens_map.json": {"pad_token": "<pad>"},
            "added_tokens.json": {"<tool_call>": size + 2},
        },
    }
    result = []
    for name, files in cases.items():
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder)
            (path / "tokenizer.json").write_bytes(base.read_bytes())
            for file, content in files.items():
                (path / file).write_text(json.dumps(content))
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        ids = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
        decoded = [tokenizer.decode(line, skip_special_tokens=True) for line in ids]
        result.append({"name": name, "files": files, "ids": ids, "decoded": decoded})
    document = {"texts": TEXTS, "cases": result}
    (GOLDEN / "added_tokens.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
