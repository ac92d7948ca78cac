"""The model card: what the run's own files say, and nothing else."""

from __future__ import annotations

from typing import Any

import ultramem
from ultramem.config import ModelConfig
from ultramem.counts import count
from ultramem.export.options import ExportOptions
from ultramem.export.run_facts import RunFacts

_SPLITS = {
    "held_out": "held-out text",
    "out_of_domain": "out-of-domain text",
    "held_out_sample": "a sample of held-out text, during training",
}

_USE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{folder}")
prompt = tokenizer("It was a truth", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=100)[0], skip_special_tokens=True))
```

`{folder}` is this folder. The model's code stands in it, in plain PyTorch: `trust_remote_code=True` runs it, so read it
first where you do not know who wrote it. Made for transformers 5.24; `generate` does greedy search, sampling, beams and
assisted decoding, with left padding."""


def model_card(config: ModelConfig, run: RunFacts | None, options: ExportOptions | None = None) -> str:
    """README.md of an export; without a run only what the model's shape and the options say."""
    options = options or ExportOptions()
    name = run.name if run is not None else family(config)
    parts = [_front_matter(config), f"# {name}", _what_it_is(config) + _rounding(options), "## Use", _use(run)]
    if run is not None:
        parts += ["## Figures", _figures(run, options), "## Training", _training(run)]
    parts += [
        "## Limits",
        f"Contexts up to {config.max_positions:,} tokens. It continues text like that which it was trained on; it was "
        "not taught to follow instructions. `manifest.json` holds the hash of every file and how far the logits are "
        "from those of `ultramem`.",
    ]
    return "\n\n".join(parts) + "\n"


def family(config: ModelConfig) -> str:
    """The name of the model's family, as far as its switches tell."""
    memory = config.memory
    if config.moe is not None:
        return "mixture of experts"
    if memory is None:
        return "dense transformer"
    if memory.expert_dim:
        return "UltraMemV2" if memory.rank > 1 else "PEER"
    if memory.rank > 1:
        return "UltraMem"
    return "Memory+" if memory.output == "gated" else "product-key memory"


def _front_matter(config: ModelConfig) -> str:
    tags = ["ultramem", *(["memory-layers"] if config.memory is not None else [])]
    lines = ["library_name: transformers", "pipeline_tag: text-generation", "tags:", *(f"- {tag}" for tag in tags)]
    return "\n".join(["---", *lines, "---"])


def _what_it_is(config: ModelConfig) -> str:
    counts = count(config)
    text = (
        f"A decoder of {config.num_layers} layers of width {config.hidden_size} ({family(config)}), "
        f"{counts.total_with_embeddings:,} parameters with embedding and head, vocabulary of {config.vocab_size:,}. "
        f"Made with [ultramem](https://arxiv.org/abs/2411.12364) {ultramem.__version__}."
    )
    memory = config.memory
    if memory is not None:
        text += (
            f" {len(config.parsed_insertions)} memory layers ({config.insertions}) keep {memory.num_slots} of "
            f"{memory.expansion * memory.num_values:,} virtual rows of {memory.value_dim} for each token."
        )
    return text


def _use(run: RunFacts | None) -> str:
    use = _USE.format(folder="DIR")
    return use if run is not None else use + " This export has no tokenizer: it was made from a model without its run."


def _rounding(options: ExportOptions) -> str:
    parts = [f"weights in {options.dtype}"] if options.dtype != "fp32" else []
    if options.table is not None:
        parts.append(f"rows of the tables in {options.table} with a float32 scale each")
    return f" Rounded after training: {', '.join(parts)}." if parts else ""


def _figures(run: RunFacts, options: ExportOptions) -> str:
    if not run.evaluations:
        return "The run's folder holds no evaluation."
    rows = [
        "| text | bits per byte | loss, nats per token | perplexity | tokens | step |",
        "| --- " + "| ---: " * 5 + "|",
    ]
    for split, row in run.evaluations.items():
        figures = (f"{row['bits_per_byte']:.4f}", f"{row['eval_loss']:.4f}", f"{row['perplexity']:.3f}")
        cells = (_SPLITS.get(split, split), *figures, f"{row['tokens']:,}", f"{row['step']:,}")
        rows.append("| " + " | ".join(cells) + " |")
    if _rounding(options):
        rows += ["", "Of the float32 weights; `parity.rounding` in `manifest.json` says what rounding cost."]
    return "\n".join(rows)


def _training(run: RunFacts) -> str:
    train, data, where = (run.config.get(section, {}) for section in ("train", "data", "environment"))
    lines = []
    if train:
        tokens = train["steps"] * train["batch_size"] * train["sequence_length"]
        lines.append(
            f"{train['steps']:,} steps of {train['batch_size']} sequences of {train['sequence_length']} tokens "
            f"({tokens:,} tokens), peak learning rate {train['lr']:g}, tables {train['value_lr_ratio']:g} times that, "
            f"weight decay {train['weight_decay']:g}, seed {train['seed']}."
        )
    if data:
        lines.append(f"Text: `{data['name']}`, sha256 `{data['sha256']}`.")
    if where:
        lines.append(f"Begun with {_versions(where)}, on `{where['device']}`.")
    return "\n".join(lines) if lines else "The run's folder does not say how it was trained."


def _versions(environment: dict[str, Any]) -> str:
    return ", ".join(f"{name} {environment[name]}" for name in ("ultramem", "torch", "python"))
