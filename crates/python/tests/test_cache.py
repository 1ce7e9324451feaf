"""`iceformer.KeyValueCache` against attention on whole arrays."""

import copy
import pickle

import iceformer
import numpy as np
import pytest
import torch


def sequence(tokens=150, heads=4, kv_heads=2, width=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((heads, tokens, width), (kv_heads, tokens, width), (kv_heads, tokens, 16))
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("chunks", [[150], [1] * 150, [100, 1, 49], [0, 150]])
@pytest.mark.parametrize("kv_type, tolerance", [("f32", 1e-5), ("bf16", 3e-2), ("int8", 5e-2)])
def test_chunks_give_what_the_whole_gives(chunks, kv_type, tolerance):
    queries, keys, values = sequence()
    wanted = iceformer.attention(queries[None], keys[None], values[None], causal=True)[0]
    cache = iceformer.KeyValueCache(kv_heads=2, key_dim=32, value_dim=16, kv_type=kv_type)
    parts, first = [], 0
    for count in chunks:
        part = slice(first, first + count)
        cache.append(keys[:, part], values[:, part])
        parts.append(cache.attend(queries[:, part]))
        first += count
    assert len(cache) == 150
    assert (torch.cat(parts, dim=1) - wanted).abs().max() < tolerance


def test_truncated_and_appended_again():
    queries, keys, values = (array.numpy() for array in sequence())
    cache = iceformer.KeyValueCache(kv_heads=2, key_dim=32, value_dim=16)
    cache.append(keys, values)
    wanted = cache.attend(queries[:, 60:90], first_position=60)
    cache.truncate(60)
    assert len(cache) == 60
    cache.append(keys[:, 60:90], values[:, 60:90])
    assert isinstance(wanted, np.ndarray)
    assert (cache.attend(queries[:, 60:90]) == wanted).all()


def test_what_a_cache_tells():
    cache = iceformer.KeyValueCache(kv_heads=2, key_dim=32, kv_type="int8")
    assert (cache.kv_heads, cache.key_dim, cache.value_dim, cache.kv_type, len(cache)) == (2, 32, 32, "int8", 0)
    assert cache.nbytes == 0
    _, keys, _ = sequence()
    cache.append(keys, keys)
    # Memory comes for 512 keys at a time, of a longer cache for more.
    assert 2 * 2 * 150 * 32 <= cache.nbytes <= 2 * 2 * 512 * (32 + 4)
    assert repr(cache) == "KeyValueCache(kv_heads=2, key_dim=32, value_dim=32, kv_type='int8', tokens=150)"
    output, report = cache.attend(sequence()[0][:, :1], return_report=True)
    assert output.shape == (4, 1, 32) and report.allowed_keys == 4 * 150


def test_positions_out_of_range_are_named():
    cache = iceformer.KeyValueCache(1, 8)
    for length in (-1, 2**63):
        with pytest.raises(ValueError, match="length is .*; expected"):
            cache.truncate(length)
    with pytest.raises(ValueError, match="first_position is -1; expected 0 or more"):
        cache.attend(np.zeros((1, 1, 8), np.float32), first_position=-1)


def test_a_cache_has_no_copies():
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="a KeyValueCache cannot be copied"):
            copied(iceformer.KeyValueCache(1, 8))


@pytest.mark.parametrize("sizes", [(2**40, 8), (1, 2**62), (2**62, 4), (2**16, 2**16), (0, 8)])
def test_sizes_that_no_machine_has(sizes):
    with pytest.raises(ValueError, match="expected"):
        iceformer.KeyValueCache(*sizes)


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"kv_heads": 2.0}, TypeError, "kv_heads is a float; expected a whole number"),
        ({"kv_heads": -1}, ValueError, "kv_heads is -1; expected 1 or more"),
        ({"key_dim": "4"}, TypeError, "key_dim is a str; expected a whole number"),
        ({"value_dim": 4.0}, TypeError, "value_dim is a float; expected a whole number"),
        ({"kv_type": None}, TypeError, 'kv_type is None; expected "auto"'),
    ],
)
def test_settings_of_other_types_are_named(settings, error, message):
    with pytest.raises(error, match=message):
        iceformer.KeyValueCache(**{"kv_heads": 1, "key_dim": 4, **settings})


def test_what_does_not_fit_is_named():
    queries, keys, values = sequence()
    cache = iceformer.KeyValueCache(kv_heads=2, key_dim=32, value_dim=16)
    with pytest.raises(ValueError, match=r"keys are \[1, 150, 32\]; expected \[2, tokens, 32\]"):
        cache.append(keys[:1], values)
    with pytest.raises(ValueError, match="150 keys and 3 values"):
        cache.append(keys, values[:, :3])
    with pytest.raises(ValueError, match="has 2 dimensions.*expected 3"):
        cache.append(keys[0], values[0])
    with pytest.raises(ValueError, match=r"queries are \[3, 150, 32\]; expected \[a multiple of 2"):
        cache.attend(queries[:3])
    with pytest.raises(ValueError, match="kv_heads is 0"):
        iceformer.KeyValueCache(kv_heads=0, key_dim=1)
    assert len(cache) == 0
