"""Continues a text with any decoder of Hugging Face transformers, its attention computed by IceFormer.

python continue_with_transformers.py MODEL "Once upon a time"
"""

import argparse

import iceformer.transformers
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--max-tokens", type=int, default=40)
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, attn_implementation="iceformer")
    tokens = tokenizer(arguments.text, return_tensors="pt")
    output = model.generate(**tokens, max_new_tokens=arguments.max_tokens, do_sample=False)
    print(tokenizer.decode(output[0], skip_special_tokens=True))
    print(iceformer.transformers.last_report())


if __name__ == "__main__":
    main()
