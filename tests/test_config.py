"""ModelConfig: what cannot work is refused with the key, its value, and what is allowed."""

import pytest
from networks import tiny_config
from pydantic import ValidationError

from model.config import ModelConfig
from model.mixers import MIXERS
from model.pattern import expand_pattern

WORDS = ", ".join(MIXERS)


def refusal(**overrides) -> str:
    """The message of a config that is refused, with the key where it has one."""
    with pytest.raises(ValidationError) as refused:
        tiny_config(**overrides)
    error = refused.value.errors()[0]
    where = error["loc"][0] if error["loc"] else None  # behind the key come pydantic's own words
    return f"{where}: {error['msg']}" if where else error["msg"].removeprefix("Value error, ")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"n_head": 6, "n_kv_head": 4}, "n_head (6) must be divisible by n_kv_head (4)"),
        ({"n_head": 6, "n_kv_head": 12}, "n_head (6) must be divisible by n_kv_head (12)"),
        (
            {"n_embd": 20, "n_head": 6, "head_dim": None},
            "n_embd (20) must be divisible by n_head (6), or head_dim be given",
        ),
        ({"head_dim": 7}, "RoPE rotates pairs: head_dim (7) must be even"),
        ({"head_dim": None, "n_embd": 30}, "RoPE rotates pairs: head_dim (5) must be even"),
        (
            {"pattern": "swa full"},
            "pattern ('swa full') has swa layers: give window, the number of keys a query sees",
        ),
        ({"rope_base": 0.0}, "rope_base (0.0) must be above 0"),
        ({"rope_base": {"full": -2.0}}, "rope_base ({'full': -2.0}) must be above 0"),
        (
            {"position": {"fulll": "rope"}},
            f"position.fulll is not a kind of layer; the kinds are {WORDS}",
        ),
        (
            {"position": {"full": "rope"}, "pattern": "1:1", "window": 3},
            "position has no value for swa layers, which pattern ('1:1') has",
        ),
        (
            {"position": "none", "rope_scaling": "linear", "rope_factor": 2.0},
            "rope_scaling (linear) needs position = rope, and full layers have none",
        ),
        (
            {"position": "alibi", "rope_factor": 2.0},
            "rope_factor (2.0) needs position = rope, and full layers have alibi",
        ),
        (
            {"position": "learned", "rope_fraction": 0.5},
            "rope_fraction (0.5) needs position = rope, and full layers have learned",
        ),
        ({"rope_fraction": 0.1}, "rope_fraction (0.1) of head_dim (8) must be an even number of channels"),
        ({"rope_fraction": 0.125}, "rope_fraction (0.125) of head_dim (8) must be an even number of channels"),
        ({"rope_fraction": 0.0}, "rope_fraction (0.0) of head_dim (8) must be an even number of channels"),
        ({"rope_fraction": 1.5}, "rope_fraction (1.5) of head_dim (8) must be an even number of channels"),
        (
            {"rope_factor": 4.0},
            "rope_factor (4.0) and rope_scaling (none) of full layers: give both, with a factor above 1, or neither",
        ),
        (
            {"rope_scaling": "linear"},
            "rope_factor (1.0) and rope_scaling (linear) of full layers: give both, with a factor above 1, or neither",
        ),
        (
            {"rope_scaling": "linear", "rope_factor": 0.5},
            "rope_factor (0.5) and rope_scaling (linear) of full layers: give both, with a factor above 1, or neither",
        ),
        (
            {"rope_scaling": "yarn", "rope_factor": 4.0},
            "rope_scaling (yarn) needs rope_trained (None), the context that it extends, "
            "and a rope_base (10000.0) above 1",
        ),
        (
            {"qk_norm": False, "qk_norm_over": "projection"},
            "qk_norm_over (projection) has no effect with qk_norm = false: leave one out",
        ),
        (
            {"bias": True, "attn_bias": "qkv"},
            "attn_bias (qkv) has no effect with bias = true, which sets all biases: leave one out",
        ),
        ({"pattern": "swa", "window": ()}, "window ([]) must be one or several numbers of keys, each at least 1"),
        (
            {"pattern": "swa", "window": (4, 0)},
            "window ([4, 0]) must be one or several numbers of keys, each at least 1",
        ),
        (
            {"position": {"full": "learned"}},
            "position = learned is one table for the whole model: it cannot be given by kind of layer",
        ),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused(overrides, message):
    assert refusal(**overrides) == message


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("window", 0, "greater than or equal to 1"),
        ("window", -1, "greater than or equal to 1"),
        ("window", 2.5, "valid integer"),
        ("window_everywhere", 0, "greater than or equal to 1"),
        ("n_sink", -1, "greater than or equal to 0"),
        ("n_head", 0, "greater than or equal to 1"),
        ("n_kv_head", 0, "greater than or equal to 1"),
        ("n_layer", 0, "greater than or equal to 1"),
        ("head_dim", 0, "greater than or equal to 1"),
        ("block_size", 0, "greater than or equal to 1"),
        ("vocab_size", 1, "greater than or equal to 2"),
        ("dropout", 1.0, "less than 1"),
        ("attn_softcap", 0.0, "greater than 0"),
        ("logit_softcap", -30.0, "greater than 0"),
        ("attn_scale", 0.0, "greater than 0"),
        ("rope_trained", 0, "greater than or equal to 1"),
        ("rope_scaling", "ntk", "'none', 'linear', 'yarn' or 'llama3'"),
        ("attn_gate", "token", "'none', 'head' or 'channel'"),
        ("attn_bias", "q", "'qkv' or 'all'"),
        ("norm_place", "both", "'pre', 'post' or 'sandwich'"),
        ("qk_norm_over", "token", "'head' or 'projection'"),
        ("norm_eps", 0.0, "greater than 0"),
        ("norm", "batchnorm", "'rmsnorm', 'rmsnorm+1' or 'layernorm'"),
        ("mlp", "relu", "'swiglu', 'geglu', 'gelu', 'gelu-tanh' or 'relu2'"),
        ("n_kv_heads", 2, "not permitted"),
        ("bias", "perhaps", "valid boolean"),
    ],
)
def test_value_out_of_range_is_refused_with_its_key(key, value, message):
    refused = refusal(**{key: value})
    assert refused.startswith(f"{key}: ")
    assert message in refused


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["rope_base", "norm_eps"])
def test_number_that_is_not_finite_is_refused(key, value):
    assert key in refusal(**{key: value})


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            "sva",
            f"'sva' is not a layer; layers are {WORDS}, as \"swa*5 full\"; did you mean swa?",
        ),
        (
            "swa ful",
            f"'ful' is not a layer; layers are {WORDS}, as \"swa*5 full\"; did you mean full?",
        ),
        (
            "full*0",
            f"'full*0' is not a layer; layers are {WORDS}, as \"swa*5 full\"; did you mean full?",
        ),
        ("swa*-1", "'swa*-1' is not a layer"),
        ("swa*", "'swa*' is not a layer"),
        ("swa,full", "'swa,full' is not a layer"),
        ("xyz", f"'xyz' is not a layer; layers are {WORDS}, as \"swa*5 full\""),
        ("", f'is empty; layers are {WORDS}, as "swa*5 full" or "5:1"'),
        ("  ", "is empty"),
    ],
)
def test_unknown_word_in_a_pattern_is_refused(pattern, message):
    refused = refusal(pattern=pattern, window=3)
    assert refused.startswith(f"pattern ({pattern!r})")
    assert message in refused


@pytest.mark.parametrize("pattern", ["5:", ":1", ":", "0:0", "5:1:2", "-1:2", "a:b", "1.5:1", "5:1 full"])
def test_ratio_that_is_none_is_refused(pattern):
    expected = f'pattern ({pattern!r}): a ratio is "a:b", a swa layers to b full ones, a + b >= 1, as "5:1"'
    assert refusal(pattern=pattern, window=3) == expected


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("full", ["full"]),
        ("swa*2 full", ["swa", "swa", "full"]),
        (" full  swa*1 ", ["full", "swa"]),
        ("5:1", ["swa"] * 5 + ["full"]),
        ("0:2", ["full"] * 2),
        ("3:0", ["swa"] * 3),
        (" 1 : 2 ", ["swa", "full", "full"]),
    ],
)
def test_pattern_expands_to_words(pattern, words):
    assert list(expand_pattern(pattern, MIXERS)) == words


@pytest.mark.parametrize(
    ("pattern", "n_layer", "kinds"),
    [
        ("swa full", 5, "swa full swa full swa"),
        ("5:1", 4, "swa swa swa swa"),
        ("full swa*2", 3, "full swa swa"),
        ("2:1", 7, "swa swa full swa swa full swa"),
    ],
)
def test_pattern_is_tiled_over_depth_and_cut(pattern, n_layer, kinds):
    config = tiny_config(pattern=pattern, n_layer=n_layer, window=3)
    assert " ".join(config.kinds) == kinds
    assert [spec.kind for spec in config.layers] == kinds.split()


def test_ratio_equals_its_expansion():
    ratio, words = (tiny_config(pattern=p, n_layer=32, window=3) for p in ("5:1", "swa*5 full"))
    assert ratio.layers == words.layers
    assert [spec.window for spec in ratio.layers].count(3) == 27


def test_description_of_layers_is_short():
    assert tiny_config(pattern="5:1", n_layer=13, window=3).describe() == "swa*5 full swa*5 full swa"


def test_only_sliding_layers_have_window_and_sinks():
    swa, full = tiny_config(pattern="swa full", window=3, n_sink=2).layers
    assert (swa.window, swa.n_sink) == (3, 2)
    assert (full.window, full.n_sink) == (None, 0)


def test_windows_are_tiled_over_the_sliding_layers():
    config = tiny_config(pattern="swa*2 full", n_layer=8, window=(3, 5, 9))
    assert [spec.window for spec in config.layers] == [3, 5, None, 9, 3, None, 5, 9]


def test_stretched_positions_by_kind_reach_their_layers():
    config = tiny_config(
        pattern="swa full",
        window=3,
        rope_scaling={"swa": "none", "full": "yarn"},
        rope_factor={"swa": 1.0, "full": 8.0},
        rope_fraction={"swa": 1.0, "full": 0.5},
        rope_trained=64,
    )
    swa, full = config.layers
    assert (swa.rope.scaling, swa.rope.factor, swa.rope.width) == ("none", 1.0, 8)
    assert (full.rope.scaling, full.rope.factor, full.rope.width, full.rope.trained_length) == ("yarn", 8.0, 4, 64)


def test_tables_by_kind_reach_their_layers():
    swa, full = tiny_config(
        pattern="swa full",
        window=3,
        rope_base={"swa": 100.0, "full": 1e6},
        position={"swa": "rope", "full": "none"},
    ).layers
    assert (swa.rope.base, full.rope) == (100.0, None)


def test_odd_head_width_is_fine_where_nothing_rotates():
    assert tiny_config(head_dim=7, position="none").head_width == 7


@pytest.mark.parametrize("pattern", ["full", "swa full"])
def test_sliding_gives_every_layer_the_window_and_its_own_positions(pattern):
    config = tiny_config(pattern=pattern, window=9, rope_base={"swa": 100.0, "full": 1e6})
    slid = config.sliding(4, 2)
    assert [(spec.window, spec.n_sink) for spec in slid.layers] == [(4, 2)] * 2
    assert [spec.rope for spec in slid.layers] == [spec.rope for spec in config.layers]


def test_sliding_refuses_what_building_refuses():
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        tiny_config().sliding(0, 2)


@pytest.mark.parametrize(
    ("overrides", "notes"),
    [
        ({}, []),
        ({"pattern": "1:1", "window": 15, "n_sink": 1}, []),
        ({"pattern": "mswa", "head_windows": (3, 5), "n_sink": 1}, []),
        ({"pattern": "swa", "window": (3, 9)}, []),
        ({"window": 3}, ["window (3) is used by no layer: pattern ('full') has no swa"]),
        ({"n_sink": 2}, ["n_sink (2) is used by no layer: pattern ('full') has no swa"]),
        (
            {"pattern": "swa", "window": 16},
            ["window (16) covers block_size (16): in training every layer sees all"],
        ),
    ],
    ids=str,
)
def test_notes_say_what_is_probably_not_meant(overrides, notes):
    assert list(tiny_config(**overrides).notes()) == notes


def test_config_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        tiny_config().n_layer = 3


def test_config_survives_json():
    config = tiny_config(pattern="2:1", window=3, rope_base={"swa": 100.0, "full": 1e6})
    assert ModelConfig.model_validate_json(config.model_dump_json()) == config
