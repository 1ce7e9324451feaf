"""attn_implementation="iceformer" against SDPA (or eager, where SDPA has no answer) in real transformers."""

import os
import subprocess
import sys
import warnings

import iceformer.transformers as hook
import pytest
import torch
import transformers as tf
from iceformer import _operator
from iceformer._masks import pattern_of
from torch.autograd import forward_ad
from models import SMALL, TOKENS, build, decoders, encoders, oracle

DECODERS, ENCODERS = decoders(), encoders()
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad(), warnings.catch_warnings():
        # Nothing here may be handed over unless a test says so.
        warnings.filterwarnings("error", message="iceformer hands attention over|attention goes without")
        hook._warned.clear()
        # Masks are told only where nothing is compiled.
        torch._dynamo.reset()
        yield


def tokens(batch=3, length=40, seed=0):
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def padding(side, batch=3, length=40):
    mask = torch.ones(batch, length, dtype=torch.long)
    for row, missing in enumerate([0, 7, 23][:batch]):
        if side == "left":
            mask[row, :missing] = 0
        elif side == "right":
            mask[row, length - missing :] = 0
    return mask


def both(models, name):
    kind, config = models[name]
    return build(kind, config, "iceformer"), build(kind, config, oracle(name))


def assert_same(found, wanted, mask=None):
    assert len(found) == len(wanted)
    for layer, (one, other) in enumerate(zip(found, wanted)):
        error = (one - other).abs()
        if mask is not None:
            error = error * mask[..., None]
        assert error.max() <= TOLERANCE * max(1.0, other.abs().max()), f"layer {layer}: {error.max()}"


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_hidden_states(name, side):
    ours, theirs = both(DECODERS | ENCODERS, name)
    mask = padding(side)
    arguments = {"input_ids": tokens(), "attention_mask": mask, "output_hidden_states": True}
    hook._reports.last = None
    found = ours(**arguments).hidden_states
    report = hook.last_report()
    assert report is not None and report.rows == 3 * 4 * 40
    assert_same(found, theirs(**arguments).hidden_states, mask)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("side", ["none", "left"])
def test_prompt_in_chunks(name, side):
    ours, theirs = both(DECODERS, name)
    ids, mask = tokens(), padding(side)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    wanted = theirs(ids, attention_mask=mask, position_ids=positions).logits
    cache, parts = tf.DynamicCache(config=ours.config), []
    for start, end in [(0, 17), (17, 18), (18, 40)]:
        step = ours(
            ids[:, start:end],
            attention_mask=mask[:, :end],
            position_ids=positions[:, start:end],
            past_key_values=cache,
            use_cache=True,
        )
        parts.append(step.logits)
    assert_same([torch.cat(parts, dim=1)], [wanted], mask)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"cache_implementation": "static"},
        {"num_beams": 3},
        {"do_sample": True, "num_return_sequences": 2},
    ],
    ids=["greedy", "static", "beams", "sampled"],
)
def test_generate(name, settings):
    if name == "gpt2" and "cache_implementation" in settings:
        pytest.skip("GPT-2 does not take a static cache")
    ours, theirs = both(DECODERS, name)
    arguments = {
        "attention_mask": padding("left"),
        "max_new_tokens": 16,
        "min_new_tokens": 16,
        "disable_compile": True,
        **settings,
    }
    torch.manual_seed(5)
    found = ours.generate(tokens(), **arguments)
    torch.manual_seed(5)
    assert torch.equal(found, theirs.generate(tokens(), **arguments))


def test_t5():
    config = tf.T5Config(
        vocab_size=97, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    ours, theirs = (build(tf.T5ForConditionalGeneration, config, name) for name in ("iceformer", "sdpa"))
    arguments = {
        "input_ids": tokens(),
        "attention_mask": padding("right"),
        "decoder_input_ids": tokens(length=15, seed=1),
        "output_hidden_states": True,
    }
    with pytest.warns(UserWarning, match="position biases"):
        found = ours(**arguments)
    wanted = theirs(**arguments)
    assert_same(found.encoder_hidden_states, wanted.encoder_hidden_states, padding("right"))
    assert_same(found.decoder_hidden_states, wanted.decoder_hidden_states)
    arguments = {"attention_mask": padding("right"), "max_new_tokens": 12}
    assert torch.equal(ours.generate(tokens(), **arguments), theirs.generate(tokens(), **arguments))


def whisper(implementation):
    config = tf.WhisperConfig(
        vocab_size=97,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        num_mel_bins=20,
        max_source_positions=60,
        decoder_start_token_id=1,
        **TOKENS,
    )
    return build(tf.WhisperModel, config, implementation)


def test_whisper_with_its_cross_attention():
    ours, theirs = whisper("iceformer"), whisper("sdpa")
    features = torch.randn(2, 20, 120, generator=torch.Generator().manual_seed(2))
    arguments = {
        "input_features": features,
        "decoder_input_ids": tokens(2, 9),
        "output_hidden_states": True,
        "use_cache": False,
    }
    with hook.collect_reports() as reports:
        found = ours(**arguments)
    assert len(reports) == 2 + 2 * 2
    wanted = theirs(**arguments)
    assert_same(found.encoder_hidden_states, wanted.encoder_hidden_states)
    assert_same(found.decoder_hidden_states, wanted.decoder_hidden_states)


def test_vit():
    config = tf.ViTConfig(**SMALL, image_size=32, patch_size=4)
    ours, theirs = (build(tf.ViTModel, config, name) for name in ("iceformer", "sdpa"))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    assert_same(
        ours(images, output_hidden_states=True).hidden_states, theirs(images, output_hidden_states=True).hidden_states
    )


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_narrow_types(dtype, tolerance):
    ours, theirs = (model.to(dtype) for model in both(DECODERS, "llama"))
    found, wanted = ours(tokens()).logits, theirs(tokens()).logits
    assert found.dtype == dtype
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


def test_attention_can_be_changed_later():
    kind, config = DECODERS["llama"]
    model = build(kind, config, "sdpa")
    wanted = model(tokens()).logits
    model.set_attn_implementation("iceformer")
    with hook.collect_reports() as reports:
        assert_same([model(tokens()).logits], [wanted])
    assert [layer for layer, _ in reports] == [0, 1]


def test_masks_of_the_users_own():
    ours, theirs = both(DECODERS, "llama")
    blocks = torch.arange(40) // 8
    mask = (blocks[:, None] >= blocks[None, :]).expand(3, 1, 40, 40)
    with pytest.warns(UserWarning, match="no causal, windowed or padding mask"):
        found = ours(tokens(), attention_mask=mask).logits
    assert_same([found], [theirs(tokens(), attention_mask=mask).logits])
    assert hook.last_report() is None


def test_told_masks_are_written_out_where_they_are_touched():
    arguments = {"batch_size": 3, "q_length": 40, "kv_length": 40, "attention_mask": padding("left").bool()}
    told, written = hook.mask(**arguments), tf.masking_utils.sdpa_mask(**arguments)
    assert isinstance(told, hook.ToldMask) and told.contiguous() is told
    assert told.shape == written.shape and told.ndim == 4 and told.dtype == torch.bool and told.pattern._tensor is None
    assert torch.equal(told[:, :, 3:, :20], written[:, :, 3:, :20])
    assert type(told | written) is torch.Tensor and torch.equal(told & written, written)


def test_told_masks_are_added_as_numbers():
    told = hook.mask(batch_size=1, q_length=5, kv_length=5)
    logits = torch.randn(1, 2, 5, 5)
    wanted = logits.masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), float("-inf")).softmax(-1)
    for added in (logits + told, told + logits, torch.add(logits, told), logits.clone().add_(told)):
        assert torch.equal(added.softmax(-1), wanted)
    in_place = logits.clone()
    in_place += told
    assert torch.equal(in_place.softmax(-1), wanted)


def written_mask():
    """A told mask as it is made where something was compiled: written out, with its pattern."""
    torch.compile(torch.nn.Identity(), backend="eager")
    return hook.mask(batch_size=1, q_length=5, kv_length=5)


def test_masks_for_compiled_graphs_are_written_out():
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            written = written_mask()
            assert type(written) is torch.Tensor and written.is_contiguous() and written.contiguous() is written
            assert torch.equal(written[0, 0], torch.ones(5, 5, dtype=torch.bool).tril())
            assert pattern_of(written).causal
    torch._dynamo.reset()
    assert isinstance(hook.mask(batch_size=1, q_length=5, kv_length=5), hook.ToldMask)


def test_written_masks_that_are_changed_lose_their_pattern():
    arrays = [torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    written = written_mask()
    written[..., 2:, 0] = False
    with pytest.warns(UserWarning, match="no causal, windowed or padding mask"):
        found = hook.attention(torch.nn.Module(), *arrays, written)[0]
    wanted = torch.nn.functional.scaled_dot_product_attention(*arrays, attn_mask=written)
    assert_same([found], [wanted.transpose(1, 2)])


@pytest.mark.parametrize("shape", [(3, 40, 40), (3, 1, 40), (40,), (3, 1, 1, 40, 40)])
def test_masks_of_other_dimensions(shape):
    model = build(*DECODERS["llama"], "iceformer")
    mask = torch.ones(shape, dtype=torch.long)
    # SDPA takes them where they mask nothing.
    assert_same([model(tokens(), attention_mask=mask).logits], [model(tokens()).logits])
    mask[..., 3] = 0
    with pytest.raises(ValueError, match=rf"attention_mask has {len(shape)} dimensions.*expected \[batch, keys\]"):
        model(tokens(), attention_mask=mask)


def deepseek(implementation):
    """Its indexer selects six keys for each query."""
    config = tf.DeepseekV32Config(
        **{**SMALL, "intermediate_size": 64},
        **TOKENS,
        vocab_size=97,
        num_key_value_heads=4,
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=2,
        kv_lora_rank=32,
        q_lora_rank=32,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        index_topk=6,
        index_n_heads=4,
        index_head_dim=16,
        max_position_embeddings=128,
    )
    return build(tf.DeepseekV32ForCausalLM, config, implementation)


@pytest.mark.parametrize("side", ["none", "left"])
def test_keys_that_a_model_selects(side):
    ours, theirs = deepseek("iceformer"), deepseek("sdpa")
    mask = padding(side)
    with pytest.warns(UserWarning, match="no causal, windowed or padding mask"):
        found = ours(tokens(), attention_mask=mask).logits
    assert_same([found], [theirs(tokens(), attention_mask=mask).logits], mask)
    arguments = {"attention_mask": mask, "max_new_tokens": 8, "min_new_tokens": 8}
    assert torch.equal(ours.generate(tokens(), **arguments), theirs.generate(tokens(), **arguments))


@pytest.mark.parametrize("kind", ["none", "boolean", "added"])
def test_selected_keys_and_masks(kind):
    arrays = [torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    indices = torch.tensor([[[0, 4], [1, 0], [2, 3], [0, 3], [1, 4]]], dtype=torch.int32)
    allowed = torch.ones(5, 5, dtype=torch.bool).tril()
    mask = {"none": None, "boolean": allowed[None, None], "added": torch.zeros(1, 1, 5, 5)}[kind]
    if kind == "added":
        mask = mask.masked_fill(~allowed, torch.finfo(torch.float32).min)
    with pytest.warns(UserWarning, match="no causal, windowed or padding mask"):
        found = hook.attention(torch.nn.Module(), *arrays, mask, indices=indices)[0]
    selected = torch.zeros(5, 5, dtype=torch.bool).scatter(-1, indices[0].long(), True)
    wanted = torch.nn.functional.scaled_dot_product_attention(*arrays, attn_mask=allowed & selected)
    assert_same([found], [wanted.transpose(1, 2)])
    with pytest.raises(ValueError, match=r"shape \(1, 4, 2\); expected \[1, 5, selected\]"):
        hook.attention(torch.nn.Module(), *arrays, mask, indices=indices[:, :4])


def test_arguments_that_are_not_known():
    query = torch.randn(1, 2, 5, 8)
    for name in ("block_indices", "sinks"):
        with pytest.raises(ValueError, match=f'Linear hands "{name}" to its attention.*"sdpa"'):
            hook.attention(torch.nn.Linear(1, 1), query, query, query, None, **{name: torch.zeros(1)})
    arguments = {"block_indices": None, "sliding_window": 3, "position_ids": torch.arange(5)[None], "use_cache": True}
    hook.attention(torch.nn.Module(), query, query, query, None, **arguments)
    with pytest.warns(UserWarning, match='attention goes without the argument "slopes"'):
        hook.attention(torch.nn.Module(), query, query, query, None, slopes=torch.zeros(2))


SELF_MADE = {
    "bloom": (tf.BloomModel, tf.BloomConfig(vocab_size=97, hidden_size=32, n_layer=1, n_head=2)),
    "mpt": (tf.MptModel, tf.MptConfig(vocab_size=97, d_model=32, n_layers=1, n_heads=2, max_seq_len=64)),
    "mpnet": (tf.MPNetModel, tf.MPNetConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)),
    "longformer": (
        tf.LongformerModel,
        tf.LongformerConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=2),
    ),
}


@pytest.mark.parametrize("name", SELF_MADE)
def test_families_that_compute_their_attention_are_refused(name):
    kind, config = SELF_MADE[name]
    with pytest.raises(ValueError, match=f"{kind.__name__} has no attention, or computes its attention itself.*eager"):
        kind._from_config(config, attn_implementation="iceformer")
    # Where it is set later transformers says so itself, and leaves the model as it is.
    model = kind._from_config(config, attn_implementation="eager")
    model.set_attn_implementation("iceformer")
    assert model.config._attn_implementation == "eager"


def test_families_without_attention_are_refused():
    config = tf.ConvNextConfig(hidden_sizes=[8, 8], depths=[1, 1], num_stages=2)
    with pytest.raises(ValueError, match="ConvNextModel has no attention, or.*eager"):
        tf.ConvNextModel._from_config(config, attn_implementation="iceformer")


def test_families_that_edit_their_masks_are_refused():
    minimax = pytest.importorskip("transformers.models.minimax_m3_vl.modeling_minimax_m3_vl").MiniMaxM3VLForCausalLM
    sparse = minimax.config_class(num_hidden_layers=2, layer_types=["full_attention", "minimax_m3_sparse"])
    for kind, config, layers, instead in [
        (tf.DeepseekV4Model, tf.DeepseekV4Config(), "compressed_sparse_attention", "eager"),
        (minimax, sparse, "minimax_m3_sparse", "sdpa"),
    ]:
        message = rf'{kind.__name__} has layers \({layers}.*that edit their masks.*attn_implementation="{instead}"'
        with pytest.raises(ValueError, match=message):
            kind._from_config(config, attn_implementation="iceformer")


def test_traces_and_wrapped_tensors_are_handed_over():
    ours, theirs = both(ENCODERS, "bert")

    class Traced(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = ours

        def forward(self, ids):
            return self.model(input_ids=ids)[0]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(Traced(), (tokens(1, 8),), check_trace=False)
    other = tokens(1, 8, seed=1)
    assert_same([traced(other)], [theirs(input_ids=other)[0]])
    embeddings = torch.randn(3, 1, 8, ours.config.hidden_size)
    with pytest.warns(UserWarning, match="wrapped"):
        mapped = torch.vmap(lambda inputs: ours(inputs_embeds=inputs)[0])(embeddings)
    assert_same(list(mapped), [theirs(inputs_embeds=inputs)[0] for inputs in embeddings])
    hook._warned.clear()
    kind, config = ENCODERS["bert"]
    with pytest.warns(UserWarning, match="wrapped"), torch._subclasses.FakeTensorMode():
        fake = kind._from_config(config, attn_implementation="iceformer").eval()
        assert fake(input_ids=torch.ones(1, 8, dtype=torch.long))[0].shape == (1, 8, config.hidden_size)


def test_tangents_are_handed_over():
    queries, tangent = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    module, key = torch.nn.Module(), torch.randn(1, 2, 5, 8)
    with forward_ad.dual_level(), pytest.warns(UserWarning, match="tangents"):
        dual = forward_ad.make_dual(queries, tangent)
        # A soft cap: SDPA has no tangents, the definition does.
        output = hook.attention(module, dual, key, key, None, softcap=5.0, is_causal=False)[0]
        found = forward_ad.unpack_dual(output).tangent

    def attend(queries):
        return _operator.eager(queries, key, key, None, 8**-0.5, 5.0)

    step = 1e-3
    wanted = (attend(queries + step * tangent) - attend(queries - step * tangent)) / (2 * step)
    assert (found - wanted).abs().max() < 1e-3


def test_gradients_of_sinks_alone():
    gradients = []
    queries, key = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    sinks = torch.randn(2, requires_grad=True)
    for attend in (
        lambda: hook.attention(torch.nn.Module(), queries, key, key, None, s_aux=sinks, is_causal=False)[0],
        lambda: _operator.eager(queries, key, key, None, 8**-0.5, None, sinks),
    ):
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sinks.grad = None
            attend().square().sum().backward()
            gradients.append(sinks.grad)
    assert gradients[0].abs().max() > 0 and torch.allclose(*gradients)


def test_holes_in_the_padding():
    ours, theirs = both(ENCODERS, "bert")
    mask = torch.ones(3, 40, dtype=torch.long)
    mask[1, 10:15] = 0
    with pytest.warns(UserWarning, match="no causal, windowed or padding mask"):
        found = ours(tokens(), attention_mask=mask, output_hidden_states=True).hidden_states
    assert_same(found, theirs(tokens(), attention_mask=mask, output_hidden_states=True).hidden_states, mask)


def test_packed_sequences():
    ours, theirs = both(DECODERS, "llama")
    positions = torch.cat([torch.arange(15), torch.arange(25)]).expand(3, -1)
    with pytest.warns(UserWarning, match="no causal, windowed or padding mask"):
        found = ours(tokens(), position_ids=positions, use_cache=False).logits
    assert_same([found], [theirs(tokens(), position_ids=positions, use_cache=False).logits])


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_training_is_handed_over(name):
    ours, theirs = both(DECODERS, name)
    gradients = []
    for model in (ours, theirs):
        with torch.enable_grad(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.train()
            loss = model(tokens(), labels=tokens()).loss
            loss.backward()
            gradients.append(next(model.parameters()).grad)
            told = [warning for warning in caught if "need gradients" in str(warning.message)]
            assert len(told) == (model is ours)
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-5 * gradients[1].abs().max()


def test_attention_weights_are_refused():
    module = torch.nn.Module()
    query = torch.zeros(1, 2, 3, 16)
    with pytest.raises(ValueError, match='attn_implementation="eager"'):
        hook.attention(module, query, query, query, None, output_attentions=True)


def test_settings():
    ours, theirs = both(DECODERS, "llama")
    wanted = theirs(tokens()).logits
    with hook.settings(kv_type="int8", threads=1) as chosen:
        assert hook.current_settings() is chosen and chosen.kv_type == "int8"
        rounded = ours(tokens()).logits
        with hook.settings(method="budgeted", budget=0.01):
            assert hook.current_settings().kv_type == "int8"
    assert hook.current_settings().kv_type == "auto"
    assert not torch.equal(rounded, ours(tokens()).logits)
    assert (rounded - wanted).abs().max() < 0.1 * wanted.abs().max()
    with hook.settings(method="budgeted", budget=0.001):
        assert (ours(tokens()).logits - wanted).abs().max() < 0.02 * wanted.abs().max()
    for changes, message in [
        ({"method": "best"}, "method is 'best'"),
        ({"budget": 0.0}, "budget is 0.0"),
        ({"kv_type": "q4"}, "kv_type is 'q4'"),
        ({"threads": 0}, "threads is 0"),
    ]:
        with pytest.raises(ValueError, match=message), hook.settings(**changes):
            pass
    for changes, message in [
        ({"budget": "0.1"}, "budget is '0.1'; expected a number"),
        ({"threads": 1.5}, "threads is 1.5; expected a whole number"),
        ({"threads": "2"}, "threads is '2'; expected a whole number"),
    ]:
        with pytest.raises(TypeError, match=message), hook.settings(**changes):
            pass
        with pytest.raises(TypeError, match=message):
            hook.configure(**changes)
    before = hook.current_settings()
    try:
        assert hook.configure(threads=1).threads == 1 == hook.current_settings().threads
    finally:
        hook.configure(threads=before.threads)


def test_settings_of_the_environment():
    code = "import iceformer.transformers as hook; print(hook.current_settings())"

    def run(**variables):
        return subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **variables}, capture_output=True, text=True, timeout=300
        )

    found = run(ICEFORMER_METHOD="budgeted", ICEFORMER_BUDGET="0.02", ICEFORMER_KV_TYPE="bf16", ICEFORMER_THREADS="1")
    assert found.stdout.strip() == "Settings(method='budgeted', budget=0.02, kv_type='bf16', threads=1)"
    found = run(ICEFORMER_BUDGET="much")
    assert "the environment variable ICEFORMER_BUDGET is 'much'; expected a number" in found.stderr


@pytest.mark.parametrize("name", ["llama", "mistral", "bert", "modernbert"])
def test_compiled_graphs(name):
    ours, theirs = both(DECODERS | ENCODERS, name)
    mask = padding("right")
    arguments = {"input_ids": tokens(), "attention_mask": mask, "output_hidden_states": True}
    if name in DECODERS:
        arguments["use_cache"] = False
    operators = []

    def backend(graph, _):
        operators.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    compiled = torch.compile(ours, backend=backend)
    found = compiled(**arguments).hidden_states
    assert any("iceformer.attention" in operator for operator in operators)
    assert not any("scaled_dot_product" in operator for operator in operators)
    assert_same(found, theirs(**arguments).hidden_states, mask)


def forward_compiled(model):
    model.forward = torch.compile(model.forward, backend="eager")
    return {"disable_compile": True}


def compiled_by_generate(_):
    # As transformers does on its own for other devices.
    config = tf.CompileConfig(backend="eager", fullgraph=True, mode=None)
    config._compile_all_devices = True
    return {"compile_config": config}


@pytest.mark.parametrize("compiled", [forward_compiled, compiled_by_generate])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_generate_compiled_over_a_static_cache(name, compiled):
    ours, theirs = both(DECODERS, name)
    arguments = {
        "attention_mask": padding("left"),
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "cache_implementation": "static",
    }
    wanted = theirs.generate(tokens(), **arguments, disable_compile=True)
    with warnings.catch_warnings():
        # What is not compiled of it is not handed over.
        warnings.filterwarnings("error", message="iceformer hands attention over")
        assert torch.equal(ours.generate(tokens(), **arguments, **compiled(ours)), wanted)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_compiled_layers(name):
    ours, theirs = both(DECODERS, name)
    wanted = theirs(tokens(), attention_mask=padding("left")).logits
    for layer in ours.model.layers[1:]:
        layer.compile(backend="eager")
    with hook.collect_reports() as reports:
        found = ours(tokens(), attention_mask=padding("left")).logits
    assert_same([found], [wanted], padding("left"))
    # The layer that is not compiled goes by the pattern.
    assert [layer for layer, _ in reports] == [0]


def test_exported_graph():
    from iceformer._operator import attention

    class Layer(torch.nn.Module):
        def forward(self, queries, keys, values, padding):
            return attention(queries, keys, values, padding, None, None, 0, True, 0, 0.25, 0.0, "exact", 0.0, "auto", 0)

    arrays = [torch.randn(2, 4, 12, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    padding_mask = torch.ones(2, 12, dtype=torch.bool)
    padding_mask[1, 9:] = False
    exported = torch.export.export(Layer(), (*arrays, padding_mask))
    mask = padding_mask[:, None, None, :] & torch.ones(12, 12, dtype=torch.bool).tril()
    wanted = torch.nn.functional.scaled_dot_product_attention(*arrays, attn_mask=mask, scale=0.25).transpose(1, 2)
    assert (exported.module()(*arrays, padding_mask) - wanted).abs().max() < 1e-5
    torch.library.opcheck(
        torch.ops.iceformer.attention.default,
        (*arrays, padding_mask, None, None, 0, True, 0, 0.25, 0.0, "exact", 0.0, "auto", 0),
    )
    holes = padding_mask.clone()
    holes[0, 3:5] = False
    mask = holes[:, None, None, :] & torch.ones(12, 12, dtype=torch.bool).tril()
    wanted = torch.nn.functional.scaled_dot_product_attention(*arrays, attn_mask=mask, scale=0.25).transpose(1, 2)
    assert (exported.module()(*arrays, holes) - wanted).abs().max() < 1e-5
