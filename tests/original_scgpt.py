"""Run with the released scGPT on the path, never with scfm: loads folders as its embed_data does, and computes.

python original_scgpt.py PLACE ...: each PLACE holds a folder `exported`, and `inputs.safetensors` with src, values and
padding (N, L) and what else the model's forward takes. What that returns becomes `outputs.safetensors` there, and
`loaded.json` names the class, the tensors of the file that the model did not take, and its own that the file lacks.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from scgpt.model import MultiOmicTransformerModel, TransformerGenerator, TransformerModel
from scgpt.tokenizer import GeneVocab
from scgpt.utils import load_pretrained


def build(args: dict[str, Any], vocab: GeneVocab) -> torch.nn.Module:
    """Return the model that args.json announces, on torch's own layers."""
    options = {
        "ntoken": len(vocab),
        "d_model": args["embsize"],
        "nhead": args["nheads"],
        "d_hid": args["d_hid"],
        "nlayers": args["nlayers"],
        "nlayers_cls": args["n_layers_cls"],
        "n_cls": args["n_cls"],
        "vocab": vocab,
        "dropout": args["dropout"],
        "pad_token": args["pad_token"],
        "pad_value": args["pad_value"],
        "do_mvc": args["MVC"],
        "explicit_zero_prob": args["explicit_zero_prob"],
        "cell_emb_style": args["cell_emb_style"],
        "mvc_decoder_style": args["mvc_decoder_style"],
        "use_fast_transformer": False,
    }
    if "pert_pad_id" in args:
        names = ("pert_pad_id", "decoder_activation", "decoder_adaptive_bias")
        return TransformerGenerator(**options, **{name: args[name] for name in names})
    names = ("do_dab", "use_batch_labels", "num_batch_labels", "domain_spec_batchnorm", "input_emb_style")
    options |= {name: args[name] for name in names} | {"n_input_bins": args.get("n_input_bins")}
    if not args["use_mod"]:
        return TransformerModel(**options)
    model = MultiOmicTransformerModel(**options, use_mod=True, ntokens_mod=args["ntokens_mod"], vocab_mod={"<pad>": 2})
    # load_pretrained takes a model that does not say which layers it has for one with flash attention
    model.use_fast_transformer = False
    return model


def compute(place: Path) -> None:
    folder = place / "exported"
    vocab = GeneVocab.from_file(folder / "vocab.json")
    for token in ("<pad>", "<cls>", "<eoc>"):
        if token not in vocab:
            vocab.append_token(token)
    args = json.loads((folder / "args.json").read_text())
    model = build(args, vocab)
    state = torch.load(folder / "best_model.pt", map_location="cpu", weights_only=True)
    load_pretrained(model, state, verbose=False)
    own = {name.replace("in_proj_", "Wqkv."): tensor for name, tensor in model.state_dict().items()}
    skipped = [name for name, tensor in state.items() if name not in own or not torch.equal(own[name], tensor)]
    lacking = [name for name in own if name not in state]
    told = {"class": type(model).__name__, "skipped": skipped, "lacking": lacking}
    (place / "loaded.json").write_text(json.dumps(told))
    given = load_file(place / "inputs.safetensors")
    with torch.no_grad():
        said = model.eval()(
            given.pop("src"),
            given.pop("values"),
            src_key_padding_mask=given.pop("src_key_padding_mask"),
            **given,
            MVC=args["MVC"],
            CLS=not args["no_cls"],
        )
    save_file({name: tensor.contiguous() for name, tensor in said.items()}, place / "outputs.safetensors")


if __name__ == "__main__":
    torch.backends.mha.set_fastpath_enabled(False)
    for place in sys.argv[1:]:
        compute(Path(place))
