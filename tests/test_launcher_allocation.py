"""The allocation grammar: every spelling in use, the round trip, and errors that point at the character."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arealite.api.errors import ConfigError
from arealite.launcher.allocation import (
    INFERENCE_BACKENDS,
    TRAIN_BACKENDS,
    AllocationMode,
    Component,
    Dims,
)


@pytest.mark.parametrize(
    ("text", "canonical", "num_devices", "num_servers"),
    [
        ("sglang.d4p1t1+d2p2t1", "sglang:d4+fsdp:d2p2", 8, 4),
        ("sglang.p1t1d4+t1p2d2", "sglang:d4+fsdp:d2p2", 8, 4),
        ("d32p1m4", "fsdp:d32t4", 128, 0),
        ("sglang:d4t2+fsdp:d8", "sglang:d4t2+fsdp:d8", 16, 4),
        ("native:d1|fsdp:d1", "native:d1|fsdp:d1", 1, 1),
        ("vllm:m2", "vllm:d1t2", 2, 1),
        (
            "sglang[rollout]:d2t2+fsdp[actor]:d4|fsdp[critic]:d4",
            "sglang[rollout]:d2t2+fsdp[actor]:d4|fsdp[critic]:d4",
            8,
            2,
        ),
        ("megatron:(attn:d4p2t2c2|ffn:d2p2t4e2)", "megatron:(attn:d4t2p2c2|ffn:d2t4p2e2)", 32, 0),
        ("sglang:d2t4e4+megatron:d2c2", "sglang:d2t4e4+megatron:d2c2", 12, 2),
        ("sglang.d4p1m1 + d2p2m1", "sglang:d4+fsdp:d2p2", 8, 4),
        (" sglang [a] : d4 t2 +\n fsdp : d 8 | fsdp[critic] :d8\t", "sglang[a]:d4t2+fsdp:d8|fsdp[critic]:d8", 16, 4),
        ("megatron: ( attn : d4 | ffn:d2e2 )", "megatron:(attn:d4|ffn:d2e2)", 4, 0),
    ],
)
def test_spellings_in_use(text, canonical, num_devices, num_servers):
    mode = AllocationMode.parse(text)
    assert str(mode) == canonical
    assert (mode.num_devices, sum(c.num_servers for c in mode.components)) == (num_devices, num_servers)
    assert AllocationMode.parse(canonical) == mode


def test_roles_and_grouping():
    mode = AllocationMode.parse("sglang[rollout]:d2t2+fsdp[actor]:d4|fsdp[critic]:d4")
    assert mode.inference == Component("sglang", Dims(d=2, t=2), "rollout")
    assert mode.train == Component("fsdp", Dims(d=4), "actor")
    assert [c.label for c in mode.components] == ["rollout", "actor", "critic"]
    assert not mode.colocated and mode.num_devices == 8
    assert AllocationMode.parse("native:d1|fsdp:d1").colocated
    assert AllocationMode.parse("d2").inference is None


sizes = st.integers(1, 8)


@st.composite
def layouts(draw, backend):
    if backend in TRAIN_BACKENDS and draw(st.booleans()):
        d, t, p, e = draw(sizes), draw(sizes), draw(sizes), draw(sizes)
        return Dims(d=d, t=t, p=p, c=e), Dims(d=t, t=d, p=p, e=e)
    d, t, c = draw(sizes), draw(sizes), draw(sizes)
    e = draw(st.sampled_from([k for k in range(1, d * t * c + 1) if d * t * c % k == 0]))
    return Dims(d=d, t=t, p=draw(sizes), c=c, e=e), None


@st.composite
def modes(draw):
    groups, num = [], 0
    for _ in range(draw(st.integers(1, 3))):
        backend = draw(st.sampled_from(INFERENCE_BACKENDS + TRAIN_BACKENDS))
        dims, ffn = draw(layouts(backend))
        group = []
        for _ in range(draw(st.integers(1, 2))):
            stem = draw(st.text("abcXYZ_-019", max_size=4))
            group.append(Component(backend, dims, f"{stem}{num}", ffn))
            num += 1
        groups.append(tuple(group))
    if draw(st.booleans()):  # one component may go without a name
        first = groups[0][0]
        groups[0] = (Component(first.backend, first.dims, "", first.ffn), *groups[0][1:])
    return AllocationMode(tuple(groups))


@given(modes())
def test_parse_undoes_str(mode):
    assert AllocationMode.parse(str(mode)) == mode


@given(st.permutations("dtpc"), st.lists(sizes, min_size=4, max_size=4), st.sampled_from("tm"))
def test_letters_come_in_any_order(order, numbers, tensor):
    values = dict(zip("dtpc", numbers, strict=True))
    text = "".join(f"{tensor if letter == 't' else letter}{values[letter]}" for letter in order)
    assert AllocationMode.parse(text).components[0].dims == Dims(**values)


@given(st.text("sglanfdptce.:+|[]()0129 m", max_size=24))
def test_any_text_is_parsed_or_refused_with_a_caret(text):
    try:
        mode = AllocationMode.parse(text)
    except ConfigError as error:
        shown, caret = str(error).split("\n")[-2:]
        assert shown == "  " + text
        assert caret.strip() == "^" and 2 <= caret.index("^") <= len(text) + 2
    else:
        assert AllocationMode.parse(str(mode)) == mode


@pytest.mark.parametrize(
    ("text", "column", "what"),
    [
        ("sglang:d4d2", 9, "given twice"),
        ("sglang:d4t2m2", 11, "given twice"),
        ("sglang:d4x2", 9, "unknown dimension 'x'"),
        ("sglang:d", 8, "expected a number"),
        ("sglang:dt2", 8, "expected a number"),
        ("sglang:d0", 8, "at least 1"),
        ("sgland:d4+fsdp:d2", 0, "did you mean 'sglang'"),
        ("sglang:d4+fsdq:d2", 10, "did you mean 'fsdp'"),
        ("sglang:d4+", 10, "unfinished"),
        ("sglang", 6, "expected ':'"),
        ("sglang:", 7, "expected dimensions"),
        ("", 0, "unfinished"),
        ("native:d1|fsdp:d2", 10, "must be equal"),
        ("fsdp:d4|fsdp:d4", 8, "name them apart"),
        ("fsdp[a:d4", 6, "expected ']'"),
        ("fsdp[]:d4", 5, "expected a name"),
        ("megatron:(attn:d4p2t2c2|ffn:d2p2t4)", 28, "same devices"),
        ("megatron:(attn:d4p2|ffn:d2p4)", 24, "common to both"),
        ("megatron:(attn:d4e2|ffn:d2e4)", 17, "not allowed in attn"),
        ("sglang:(attn:d4|ffn:d4)", 7, "for training"),
        ("fsdp:d4e3", 0, "does not divide"),
        ("fsdp:d4)", 7, "unexpected ')'"),
        ("fsdp:d1234567", 6, "digits"),
        ("nat ive:d1", 0, "unknown backend"),
        ("native:d1 fsdp:d1", 10, "unknown dimension"),
    ],
)
def test_errors_point_at_the_character(text, column, what):
    with pytest.raises(ConfigError) as caught:
        AllocationMode.parse(text)
    message, shown, caret = str(caught.value).split("\n")
    assert what in message
    assert shown == "  " + text and caret.index("^") - 2 == column
