"""The table of mixers: each word of a pattern and its module. docs/add-a-mixer.md adds one."""

from model.mixers.attention import Attention
from model.mixers.base import Mixer
from model.mixers.linear import LinearAttention
from model.mixers.multi_window import MultiWindowAttention

MIXERS: dict[str, type[Mixer]] = {
    "full": Attention,
    "swa": Attention,
    "strided": Attention,
    "fixed": Attention,
    "star": Attention,
    "mswa": MultiWindowAttention,
    "linear": LinearAttention,
}
