"""Attention mass on the first tokens of a context."""

import statistics

from data.loader import eval_batches
from inference.attention_mass import attention_mass
from model.errors import UserError
from scripts.probes.options import Options
from scripts.probes.results import Found, column, table
from scripts.probes.subject import Subject

MAX_TOKENS = 32_768  # tokens to average over


def to_first(subject: Subject, options: Options) -> Found:
    """Mean attention probability that later tokens assign to the first k tokens, by layer and over all layers."""
    k, context = options.attention_to_first, options.context or subject.config.model.block_size
    assert k is not None
    if k >= context:
        raise UserError(f"--attention-to-first ({k}) must be less than the context length ({context})")
    subject.check_context(context)
    tokens = subject.tokens(options.text, MAX_TOKENS)
    max_tokens = min(MAX_TOKENS, tokens.n_tokens - 1) // context * context  # whole contexts
    if max_tokens == 0:
        raise UserError(
            f"{tokens.name} has {tokens.n_tokens} tokens, less than one context of {context}: give a smaller --context"
        )
    rows = subject.batch_rows(context)
    batches = eval_batches(tokens, block_size=context, batch_size=rows, max_tokens=max_tokens)
    mass = attention_mass(subject.model, (idx.to(subject.runtime.device) for idx, _ in batches), k)
    if not mass:
        raise UserError("--attention-to-first: no layer of this model has attention probabilities")
    conditions = {"k": k, "context": options.context, "text": options.text and tokens.name}
    mean = statistics.mean(mass.values())
    figures = {column("attention_to_first", **conditions): mean}
    figures |= {column("attention_to_first", layer=i, **conditions): value for i, value in mass.items()}
    kinds = subject.config.model.kinds
    lines = [(f"layer {i} ({kinds[i]})", f"{value:.4f}") for i, value in mass.items()]
    uniform = statistics.mean(k / seen for seen in range(k + 1, context + 1))
    lines += [("all layers", f"{mean:.4f}"), ("with uniform attention", f"{uniform:.4f}")]
    head = f"attention to the first {k} of {context} tokens"
    return Found(figures=figures, text=f"{head}\n{table(lines)}")
