"""Run in a process that cannot import `ultramem`: `python -I -S huggingface_probe.py FOLDER PATH...`.

FOLDER holds exports (each a folder), and inputs.pt with the tokens to run. Writes outputs.pt.
"""

import sys

folder = sys.argv[1]
sys.path += sys.argv[2:]

import json  # noqa: E402
import warnings  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, set_seed  # noqa: E402

GREEDY = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}


def importable():
    try:
        import ultramem  # noqa: F401
    except ImportError:
        return False
    return True


@torch.inference_mode()
def steps(model, tokens, mask, prompt):
    """Logits of a prompt and of the single tokens after it."""
    output = model(tokens[:, :prompt], attention_mask=mask[:, :prompt])
    pieces = [output.logits]
    for end in range(prompt + 1, tokens.shape[1] + 1):
        output = model(tokens[:, end - 1 : end], attention_mask=mask[:, :end], cache=output.cache)
        pieces.append(output.logits)
    return torch.cat(pieces, 1)


@torch.inference_mode()
def chunks(model, tokens, mask, sizes=(3, 50, 4)):
    """Logits of a prompt that is read in several pieces, the last of which holds the rest."""
    pieces, cache, start = [], None, 0
    for end in (*torch.tensor(sizes).cumsum(0).tolist(), tokens.shape[1]):
        output = model(tokens[:, start:end], attention_mask=mask[:, :end], cache=cache)
        pieces.append(output.logits)
        cache, start = output.cache, end
    return torch.cat(pieces, 1)


def generated(model, tokens, mask):
    """New tokens by every way of generating, with a cache and (where that is possible) without."""

    def run(use_cache=True, **options):
        set_seed(0)
        output = model.generate(tokens, attention_mask=mask, use_cache=use_cache, **{**GREEDY, **options})
        return output[:, tokens.shape[1] :]

    ways = {
        "greedy": {},
        "sampling": {"do_sample": True, "top_k": 5, "temperature": 0.7},
        "beams": {"num_beams": 3},
    }
    found = {name: (run(**options), run(use_cache=False, **options)) for name, options in ways.items()}
    single = model.generate(tokens[:1], **GREEDY), model.generate(tokens[:1], prompt_lookup_num_tokens=2, **GREEDY)
    return found | {"assisted": single}


def probe(path, inputs):
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
    assert not model.training
    saved, state = load_file(path / "model.safetensors"), model.state_dict()
    again = path.parent / f"{path.name}-again"
    model.save_pretrained(again)
    tokens, mask, _ = inputs["steps"][-1]
    with torch.inference_mode():
        whole = model(tokens, attention_mask=mask, use_cache=False, output_hidden_states=True)
        last = model(tokens, attention_mask=mask, logits_to_keep=2).logits
        loss = model(tokens, labels=tokens).loss
        reloaded = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)(tokens, attention_mask=mask)
        base = AutoModel.from_pretrained(path, trust_remote_code=True)(tokens, attention_mask=mask).last_hidden_state
    eager = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, attn_implementation="eager")
    with torch.inference_mode():
        weights = eager(tokens, attention_mask=mask, output_attentions=True)
    return {
        "module": type(model).__module__,
        "same_weights": saved.keys() == state.keys() and all(torch.equal(saved[name], state[name]) for name in saved),
        "again_files": sorted(each.name for each in again.iterdir()),
        "steps": [steps(model, *each) for each in inputs["steps"]],
        "whole": whole.logits,
        "chunks": chunks(model, tokens, mask),
        "base": base,
        "hidden_states": whole.hidden_states,
        "last": last,
        "loss": loss,
        "again": reloaded.logits,
        "eager_attention": weights.logits,
        "attentions": weights.attentions,
        "generated": generated(model, *inputs["prompts"]),
    }


def end_tokens(path):
    config = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).generation_config
    return config.bos_token_id, config.eos_token_id, config.pad_token_id


def main(folder):
    assert not importable()
    warnings.filterwarnings("error", message=".*(not initialized|deprecated).*")
    inputs = torch.load(folder / "inputs.pt")
    outputs = {name: probe(folder / name, inputs) for name in inputs["models"]}
    texts = json.loads((folder / "texts.json").read_text())
    for name in inputs["tokenizers"]:
        tokenizer = AutoTokenizer.from_pretrained(folder / name)
        outputs[name] = {
            "ids": [tokenizer(text)["input_ids"] for text in texts],
            "bare": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts],
            "texts": [tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) for text in texts],
            "padding": tokenizer(texts, padding=True, return_tensors="pt")["attention_mask"],
            "special": (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id),
            "max_length": tokenizer.model_max_length,
            "generation": end_tokens(folder / name),
        }
    torch.save(outputs, folder / "outputs.pt")


main(Path(folder))
