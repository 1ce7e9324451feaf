"""`iceformer.attention` on NumPy arrays and torch tensors against torch's SDPA in float64."""

import gc
import resource
import threading

import iceformer
import numpy as np
import pytest
import torch
from iceformer import _core

TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def inputs(batch=2, heads=4, kv_heads=2, tokens=37, keys=70, width=32, value_dim=16, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads, tokens, width), (batch, kv_heads, keys, width), (batch, kv_heads, keys, value_dim))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def expected(queries, keys, values, *, causal=False, window=None, ranges=None, scale=None, first=None):
    tokens, count = queries.shape[2], keys.shape[2]
    first = max(count - tokens, 0) if first is None else first
    query, key = torch.arange(tokens)[:, None] + first, torch.arange(count)[None, :]
    mask = torch.ones(queries.shape[0], 1, tokens, count, dtype=torch.bool)
    if causal:
        mask &= key <= query
    if window is not None:
        mask &= (key - query).abs() < window
    for entry, (start, end) in enumerate(ranges or []):
        mask[entry] &= (key >= start) & (key < end)
    wide = [array.double() for array in (queries, keys, values)]
    result = torch.nn.functional.scaled_dot_product_attention(*wide, attn_mask=mask, scale=scale, enable_gqa=True)
    return result.masked_fill(~mask.any(-1, keepdim=True), 0.0)


def check(found, wanted, dtype):
    error = (torch.as_tensor(np.asarray(found.float())).double() - wanted).abs().max() if found.numel() else 0.0
    assert found.shape == wanted.shape
    assert found.dtype == dtype
    assert error <= TOLERANCE[dtype] * max(wanted.abs().max(), 1.0), error


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tokens, keys", [(1, 1), (1, 300), (3, 65), (70, 70), (40, 600)])
@pytest.mark.parametrize("causal", [False, True])
def test_tensors(dtype, tokens, keys, causal):
    arrays = inputs(tokens=tokens, keys=keys, dtype=dtype)
    check(iceformer.attention(*arrays, causal=causal), expected(*arrays, causal=causal), dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_numpy_arrays(dtype):
    tensors = inputs(dtype=torch.float16 if dtype == np.float16 else torch.float32)
    arrays = [tensor.numpy() for tensor in tensors]
    found = iceformer.attention(*arrays, causal=True)
    assert isinstance(found, np.ndarray) and found.dtype == dtype
    check(torch.from_numpy(found), expected(*tensors, causal=True), tensors[0].dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_any_strides(dtype):
    queries, keys, values = inputs(tokens=50, keys=50, dtype=dtype)
    wanted = expected(queries, keys, values)
    token_major = [array.transpose(1, 2).contiguous().transpose(1, 2) for array in (queries, keys, values)]
    width_first = [array.transpose(0, 3).contiguous().transpose(0, 3) for array in (queries, keys, values)]
    fused = torch.cat([queries.repeat(1, 1, 1, 2), queries], dim=-1)[..., 32:64]
    strided = torch.stack([keys, keys], dim=-1)[..., 1]
    for arrays in (token_major, width_first, (fused, strided, values)):
        check(iceformer.attention(*arrays), wanted, dtype)
    shared = keys[:1, :1].expand(2, 2, -1, -1)
    check(iceformer.attention(queries, shared, values), expected(queries, shared, values), dtype)


def test_negative_strides_and_foreign_byte_order():
    tensors = inputs(tokens=20, keys=20)
    arrays = [tensor.numpy() for tensor in tensors]
    wanted = iceformer.attention(*arrays)
    backwards = [np.ascontiguousarray(array[:, :, ::-1])[:, :, ::-1] for array in arrays]
    assert (iceformer.attention(*backwards) == wanted).all()
    foreign = [array.astype(array.dtype.newbyteorder()) for array in arrays]
    assert (iceformer.attention(*foreign) == wanted).all()
    unaligned = []
    for array in arrays:
        memory = np.empty(array.nbytes + 1, dtype=np.uint8)
        unaligned.append(memory[1:].view(array.dtype).reshape(array.shape))
        unaligned[-1][...] = array
    assert not any(array.flags.aligned for array in unaligned)
    assert (iceformer.attention(*unaligned) == wanted).all()
    read_only = [array.copy() for array in arrays]
    for array in read_only:
        array.flags.writeable = False
    assert (iceformer.attention(*read_only) == wanted).all()


def test_inputs_are_not_copied_nor_changed():
    arrays = [tensor.numpy() for tensor in inputs(batch=1, tokens=1, keys=60_000, heads=2, width=128, value_dim=128)]
    before = [array.copy() for array in arrays]
    iceformer.attention(*arrays)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3):
        iceformer.attention(*arrays)
    # The keys and values are 123 MB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 20_000
    assert all((array == old).all() for array, old in zip(arrays, before))


@pytest.mark.parametrize("tokens", [1, 4, 33, 90])
@pytest.mark.parametrize("window", [None, 1, 17])
@pytest.mark.parametrize("causal", [False, True])
def test_windows_and_padding(tokens, window, causal):
    arrays = inputs(batch=3, tokens=tokens, keys=90)
    for lengths, ranges in [
        (None, None),
        ([90, 60, 1], [(0, 90), (0, 60), (0, 1)]),
        ([(7, 90), (0, 60), (5, 5)], [(7, 90), (0, 60), (5, 5)]),
        (torch.tensor([50, 50, 50]), [(0, 50)] * 3),
    ]:
        found = iceformer.attention(*arrays, causal=causal, window=window, key_lengths=lengths)
        check(found, expected(*arrays, causal=causal, window=window, ranges=ranges), torch.float32)


def test_first_position_and_scale():
    arrays = inputs(tokens=10, keys=90)
    found = iceformer.attention(*arrays, causal=True, first_position=3, scale=0.3)
    check(found, expected(*arrays, causal=True, first=3, scale=0.3), torch.float32)


def test_sinks_and_soft_caps_by_their_definition():
    from iceformer._operator import eager

    queries, keys, values = inputs(tokens=30, keys=30)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    mask = torch.ones(30, 30, dtype=torch.bool).tril()
    for arrays in ([queries, keys, values], [queries[:, :, -1:], keys, values]):
        rows = mask[-arrays[0].shape[2] :]
        wanted = eager(*[array.double() for array in arrays], rows, 0.4, 1.5, sinks.double()).transpose(1, 2)
        found = iceformer.attention(*arrays, causal=True, scale=0.4, soft_cap=1.5, sinks=sinks)
        check(found, wanted, torch.float32)


@pytest.mark.parametrize("method", ["exact", "budgeted", "dci", "auto"])
def test_methods_and_reports(method):
    arrays = inputs(tokens=64, keys=64)
    settings = {"budget": 0.01} if method == "budgeted" else {}
    found, report = iceformer.attention(*arrays, causal=True, method=method, return_report=True, **settings)
    assert report.rows == 2 * 4 * 64 and len(report.heads) == 4
    assert report.allowed_keys == 2 * 4 * 64 * 65 // 2
    assert 0 < report.kept_share <= 1 and report.heads[0].rows == 2 * 64
    assert "kept_share" in repr(report)
    if method != "dci":
        # What a row misses of its mass is at most moved within the range of its values.
        assert (found.double() - expected(*arrays, causal=True)).abs().max() < 0.1


@pytest.mark.parametrize("kv_type, tolerance", [("f32", 3e-6), ("bf16", 3e-2), ("int8", 5e-2)])
def test_packed_types(kv_type, tolerance):
    arrays = inputs(tokens=40, keys=100)
    error = (iceformer.attention(*arrays, kv_type=kv_type).double() - expected(*arrays)).abs().max()
    assert error < tolerance


def test_large_logits_of_bfloat16_keep_their_precision_in_f32():
    queries, keys, values = inputs(batch=1, tokens=64, keys=512, width=128, dtype=torch.bfloat16)
    arrays = (8 * queries, keys, values)
    wanted = expected(*arrays)
    theirs = torch.nn.functional.scaled_dot_product_attention(*arrays, enable_gqa=True)
    errors = [
        (found.double() - wanted).abs().max()
        for found in (theirs, iceformer.attention(*arrays, kv_type="f32"), iceformer.attention(*arrays))
    ]
    assert errors[1] <= 1.5 * errors[0] and errors[2] <= 10 * errors[0], errors


def test_a_budget_leaves_room_for_rounding():
    arrays = inputs(batch=1, tokens=512, keys=5500)
    # Each query looks for a key of its own.
    arrays = [3 * arrays[1][:, :, :512].repeat_interleave(2, dim=1), *arrays[1:]]
    wanted = expected(*arrays, causal=True)
    rounds = "vnni" in _core.kernel("int8") or "amx" in _core.kernel("int8")
    # Two values lie √2 times their spread apart, in each of 16 channels by about 1.
    unit = (2 * 16) ** 0.5
    for settings, may_round in [
        ({"budget": 0.05}, True),
        ({"budget": 0.05, "kv_type": "f32"}, False),
        ({"budget": 0.005}, False),
        ({"method": "exact"}, False),
    ]:
        found, report = iceformer.attention(*arrays, causal=True, return_report=True, **settings)
        assert report.rounded_rows == report.heads[0].rounded_rows * 4
        assert report.rounded_rows == (report.rows if may_round and rounds else 0), settings
        assert f"rounded_rows={report.rounded_rows}" in repr(report)
        missed = (found.double() - wanted).norm(dim=3) / unit
        assert missed.max() < settings.get("budget", 1e-5), settings


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_key_lengths_of_every_kind(kind):
    arrays = inputs()
    wanted = iceformer.attention(*arrays, key_lengths=[(1, 5), (0, 70)])
    for lengths in ([kind([1, 5]), kind([0, 70])], [kind([1, 5]), 70], kind([[1, 5], [0, 70]])):
        assert torch.equal(iceformer.attention(*arrays, key_lengths=lengths), wanted)


def test_threads_change_nothing():
    for tokens in (1, 300):
        arrays = inputs(tokens=tokens, keys=3000)
        one = iceformer.attention(*arrays, threads=1)
        assert all(torch.equal(one, iceformer.attention(*arrays, threads=threads)) for threads in (2, 3))


def test_nothing_in_nothing_out():
    for shape in [{"batch": 0}, {"tokens": 0}, {"tokens": 0, "keys": 0}]:
        arrays = inputs(**shape)
        assert iceformer.attention(*arrays).shape == (arrays[0].shape[0], 4, arrays[0].shape[2], 16)
        assert iceformer.attention(*[array.numpy() for array in arrays]).size == 0
    for tokens in (1, 20):
        assert (iceformer.attention(*inputs(tokens=tokens, keys=0)) == 0).all()


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("operand", [0, 1, 2])
def test_nan_and_infinity_show_where_sdpa_shows_them(tokens, poison, operand):
    arrays = inputs(batch=1, heads=2, kv_heads=2, tokens=tokens, keys=40)
    arrays[operand][0, 1, -1, 3] = poison
    wanted = torch.nn.functional.scaled_dot_product_attention(*arrays)
    found = iceformer.attention(*arrays)
    # Numbers where SDPA has numbers; an infinite weighted value may be told as infinity or as NaN.
    assert torch.equal(torch.isfinite(found), torch.isfinite(wanted))
    finite = torch.isfinite(wanted)
    assert (found[finite] - wanted[finite]).abs().max() < 1e-5


@pytest.mark.parametrize("operand", [1, 2])
def test_nan_shows_in_every_row_that_sees_it(operand):
    arrays = inputs(batch=1, tokens=64, keys=64)
    arrays[operand][:, :, 40, 3] = float("nan")
    found = iceformer.attention(*arrays, causal=True)
    # Rows before may be reached by it.
    assert found[:, :, 40:, 3].isnan().all()


def test_threads_of_python():
    arrays = [inputs(tokens=tokens, keys=200, seed=tokens) for tokens in (1, 7, 200)]
    wanted = [iceformer.attention(*triple, causal=True) for triple in arrays]
    failures = []

    def work(index):
        for step in range(30):
            which = (index + step) % 3
            if not torch.equal(iceformer.attention(*arrays[which], causal=True), wanted[which]):
                failures.append((index, step))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_forked_processes_have_threads_of_their_own():
    import multiprocessing

    arrays = [array.numpy() for array in inputs(tokens=200, keys=200)]
    wanted = iceformer.attention(*arrays, threads=2)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        found = pool.apply_async(_in_child, (arrays,)).get(timeout=60)
    assert (found == wanted).all()


def _in_child(arrays):
    return np.ascontiguousarray(iceformer.attention(*arrays, threads=2))


def test_a_thousand_calls_leak_nothing():
    arrays = inputs(tokens=64, keys=256)

    def calls(count):
        for _ in range(count):
            iceformer.attention(*arrays, causal=True)
            iceformer.attention(*[array[:, :, :1] for array in arrays])
        gc.collect()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    before = calls(200)
    assert calls(1000) - before < 8_000


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda q, k, v: (q[0], k, v), ValueError, r"queries has 3 dimensions, .* expected 4: \[batch, heads"),
        (lambda q, k, v: (q, k[:1], v), ValueError, "batch of 2, keys of 1 and values of 2"),
        (lambda q, k, v: (q[:, :3], k, v), ValueError, "queries have 3 heads, keys 2"),
        (lambda q, k, v: (q, k[:, :, :5], v), ValueError, "5 keys and 70 values"),
        (lambda q, k, v: (q[..., :16], k, v), ValueError, "queries have width 16 and keys 32"),
        (lambda q, k, v: (q[..., :0], k[..., :0], v), ValueError, "keys have width 0"),
        (lambda q, k, v: (q.double(), k, v), TypeError, "numbers of type float64; expected float32, float16"),
        (lambda q, k, v: (q, k.half(), v), TypeError, "keys of float16.*expected one element type"),
        (lambda q, k, v: (q, k.numpy(), v), TypeError, "expected one library"),
        (lambda q, k, v: (q.tolist(), k, v), TypeError, "queries is a list; expected a NumPy array or a torch tensor"),
        (lambda q, k, v: (np.ma.masked_array(q), k.numpy(), v.numpy()), TypeError, "queries is a masked array"),
        (lambda q, k, v: (q, k, v.to("meta")), ValueError, "values is on meta; expected a tensor on the CPU"),
        (lambda q, k, v: (q, k.to_sparse(), v), TypeError, "keys has layout torch.sparse_coo"),
    ],
)
def test_what_does_not_fit_is_named(change, error, message):
    with pytest.raises(error, match=message):
        iceformer.attention(*change(*inputs()))


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"method": "best"}, ValueError, 'method is "best"; expected "auto", "exact"'),
        ({"method": "budgeted", "budget": 2.0}, ValueError, "the budget is 2; expected a share above 0"),
        ({"method": "exact", "budget": 0.1}, ValueError, "budget is 0.1 and method 'exact', which has none; expected"),
        ({"method": "dci", "budget": 0.1}, ValueError, "budget is 0.1 and method 'dci', which has none; expected"),
        ({"window": 0}, ValueError, "window is 0; expected 1 or more"),
        ({"key_lengths": [1]}, ValueError, "key_lengths has 1 entries for a batch of 2"),
        ({"key_lengths": [1, 71]}, ValueError, r"key_lengths\[1\] is 71; expected 0 <= start <= end <= 70"),
        ({"first_position": -1}, ValueError, "first_position is -1"),
        ({"first_position": 2**64 - 1}, ValueError, "first_position is 18446744073709551615; expected at most"),
        ({"window": 2**64}, ValueError, "window is 18446744073709551616; expected at most"),
        ({"kv_type": "q4"}, ValueError, 'kv_type is "q4"; expected'),
        ({"threads": 0}, ValueError, "threads is 0; expected 1 to 1024"),
        ({"threads": 1.5}, TypeError, "float"),
        ({"method": None}, TypeError, 'method is None; expected "auto", "exact", "budgeted" or "dci"'),
        ({"kv_type": None}, TypeError, 'kv_type is None; expected "auto", "f32", "bf16" or "int8"'),
        ({"window": 2.5}, TypeError, "window is a float; expected a whole number"),
        ({"key_lengths": [np.array([1, 5, 6]), 5]}, ValueError, r"key_lengths\[0\] is array.*; expected a length or"),
        ({"key_lengths": [np.array([1.0, 5.0]), 5]}, TypeError, r"key_lengths\[0\] is array.*whole numbers"),
        ({"key_lengths": 5}, TypeError, "key_lengths is 5; expected a length or"),
        ({"key_lengths": torch.tensor(5)}, TypeError, r"key_lengths is tensor\(5\); expected a length or"),
        ({"key_lengths": [5.0, 5]}, TypeError, r"key_lengths\[0\] is 5.0; expected a length .* of whole numbers"),
        ({"budget": "0.1"}, TypeError, "budget is '0.1'; expected a number"),
        ({"scale": torch.ones(2)}, TypeError, "scale is .*; expected a number"),
        ({"scale": float("nan")}, ValueError, "scale is nan; expected a finite number"),
        ({"scale": -1e300}, ValueError, r"scale is -1e\+300; expected a finite number of float32, at most 3.4e\+38"),
        ({"causal": "no"}, TypeError, "causal is a str; expected True or False"),
        ({"causal": torch.ones(3, 3)}, TypeError, "causal is a Tensor; expected True or False"),
        ({"sinks": 1.0}, TypeError, "sinks is 1.0; expected a number for each query head"),
        ({"sinks": torch.zeros(4, 1)}, TypeError, r"sinks\[0\] is \[0.0\]; expected a number"),
        ({"soft_cap": -1.0}, ValueError, "the soft cap is -1; expected a finite number above 0"),
        ({"sinks": [1.0]}, ValueError, "1 sinks for 4 query heads"),
    ],
)
def test_settings_out_of_range_are_named(settings, error, message):
    with pytest.raises(error, match=message):
        iceformer.attention(*inputs(), **settings)
