"""A folder that `transformers` loads: weights, plain PyTorch code of its own, tokenizer and model card.

The files `*_ultramem.py` here are what is copied: they import nothing of this package, so that the folder works where
`ultramem` is not installed.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ultramem.config import ModelConfig
from ultramem.export.backend import Backend, Run
from ultramem.export.extras import require
from ultramem.export.huggingface.card import model_card
from ultramem.export.huggingface.names import hugging_face_fields, hugging_face_state
from ultramem.export.huggingface.tokenizer_files import write_tokenizer
from ultramem.export.options import ExportOptions
from ultramem.export.program import PassRecord
from ultramem.export.run_facts import RunFacts
from ultramem.export.weights_file import write_weights
from ultramem.graph.transformer import Transformer

CODE_FILES = (
    "cache_ultramem.py",
    "configuration_ultramem.py",
    "memory_ultramem.py",
    "modeling_ultramem.py",
    "selection_ultramem.py",
    "table_ultramem.py",
)
WEIGHTS_FILE = "model.safetensors"
HOW_TO_LOAD = (
    "from transformers import AutoModelForCausalLM, AutoTokenizer",
    "model = AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)  # DIR: where model.safetensors is",
    "tokenizer = AutoTokenizer.from_pretrained(DIR)  # where the export was made from a run",
    "logits = model(**tokenizer(text, return_tensors='pt')).logits",
)
AUTO_CLASSES = {
    "AutoConfig": "configuration_ultramem.UltraMemConfig",
    "AutoModel": "modeling_ultramem.UltraMemModel",
    "AutoModelForCausalLM": "modeling_ultramem.UltraMemForCausalLM",
}


def export_huggingface(model: Transformer, options: ExportOptions, folder: Path) -> tuple[PassRecord, ...]:
    """Write weights, configuration and code to an existing folder.

    Args:
        model: in eval mode, its weights already of the types of the options.
        options: of the export.
        folder: exists and is empty.

    Raises:
        ImportError: transformers is not installed.
    """
    require("transformers", "hf")
    from ultramem.export.huggingface.configuration_ultramem import UltraMemConfig

    config = UltraMemConfig(
        **hugging_face_fields(model.config, options),
        architectures=["UltraMemForCausalLM"],
        auto_map=AUTO_CLASSES,
        dtype=options.torch_dtype,
    )
    config.save_pretrained(folder)
    for name in CODE_FILES:
        shutil.copyfile(Path(__file__).with_name(name), folder / name)
    write_weights(folder / WEIGHTS_FILE, hugging_face_state(model), metadata={"format": "pt"})
    return ()


def describe_run(folder: Path, config: ModelConfig, options: ExportOptions, run: RunFacts | None) -> None:
    """Write the model card, and of a run its tokenizer and the tokens that `generate` begins and ends with.

    Raises:
        ValueError: the model's vocabulary is not that of the run's tokenizer.
    """
    (folder / "README.md").write_text(model_card(config, run, options), encoding="utf-8")
    if run is None:
        return
    if run.vocab_size != config.vocab_size:
        raise ValueError(
            f"the model's vocab_size must be the {run.vocab_size} of the run's tokenizer, got {config.vocab_size}"
        )
    write_tokenizer(run, folder, max_positions=config.max_positions)
    require("transformers", "hf")
    from transformers import GenerationConfig

    end = run.end_of_text
    GenerationConfig(bos_token_id=end, eos_token_id=end, pad_token_id=end).save_pretrained(folder)


def load_huggingface(folder: Path, config: ModelConfig, options: ExportOptions, plugin: bool | None) -> Run:
    """The model as a function of the inputs that the manifest lists.

    It runs this package's own copy of the code, never the folder's, and reads weights from safetensors alone.

    Raises:
        ValueError: the code in the folder is not this version's.
        ImportError: transformers is not installed.
    """
    require("transformers", "hf")
    from ultramem.export.huggingface.cache_ultramem import UltraMemCache
    from ultramem.export.huggingface.modeling_ultramem import UltraMemForCausalLM

    for name in CODE_FILES:
        if not (folder / name).is_file() or (folder / name).read_bytes() != Path(__file__).with_name(name).read_bytes():
            raise ValueError(
                f"{folder / name} is not this version's: export again, or load the folder with transformers itself"
            )
    with quiet_loading():
        model = UltraMemForCausalLM.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    sources = [source - 1 for source, _ in config.parsed_insertions] if config.conv_length else []

    def run(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        input_ids, attention_mask, position_ids, *state = inputs
        cache = UltraMemCache(model.config)
        for index, layer in enumerate(cache.layers):
            layer.update(state[2 * index], state[2 * index + 1])
        for source, conv_BDW in zip(sources, state[2 * config.num_layers :], strict=True):
            cache.layers[source].inputs_BSD = conv_BDW.transpose(1, 2)
        with torch.inference_mode():
            output = model(input_ids, attention_mask=attention_mask, position_ids=position_ids, cache=cache)
        pairs = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        convs = [cache.layers[source].inputs_BSD.transpose(1, 2).contiguous() for source in sources]
        return output.logits, *pairs, *convs

    return run


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Without the library's progress bar."""
    logging = require("transformers.utils.logging", "hf")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _how_to_load(options: ExportOptions, files: frozenset[str]) -> tuple[str, ...]:
    return HOW_TO_LOAD


BACKEND = Backend(
    name="huggingface",
    files=(
        WEIGHTS_FILE,
        "config.json",
        *CODE_FILES,
        "README.md",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ),
    write=export_huggingface,
    describe=describe_run,
    load=load_huggingface,
    how_to_load=_how_to_load,
    has_graph=False,
)

__all__ = ["BACKEND", "CODE_FILES", "HOW_TO_LOAD", "describe_run", "export_huggingface", "load_huggingface"]
