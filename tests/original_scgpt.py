"""Run with the released scGPT on the path, never with scfm: loads a folder as its embed_data does, and computes.

python original_scgpt.py FOLDER INPUTS OUTPUTS [CLASS]: INPUTS are src, values and padding (N, L), and what else the
model's forward takes; OUTPUTS become what it returns; the last line printed is a JSON list of parameters that the
loader would skip.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from scgpt.model import MultiOmicTransformerModel, TransformerGenerator, TransformerModel
from scgpt.tokenizer import GeneVocab
from scgpt.utils import load_pretrained


def main(folder: Path, inputs: str, outputs: str, kind: str = "TransformerModel") -> None:
    vocab = GeneVocab.from_file(folder / "vocab.json")
    for token in ("<pad>", "<cls>", "<eoc>"):
        if token not in vocab:
            vocab.append_token(token)
    args = json.loads((folder / "args.json").read_text())
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
    if kind == "TransformerGenerator":
        names = ("pert_pad_id", "decoder_activation", "decoder_adaptive_bias")
        model = TransformerGenerator(**options, **{name: args[name] for name in names})
    else:
        names = ("do_dab", "use_batch_labels", "num_batch_labels", "domain_spec_batchnorm", "input_emb_style")
        options |= {name: args[name] for name in names} | {"n_input_bins": args.get("n_input_bins")}
        if kind == "TransformerModel":
            model = TransformerModel(**options)
        else:
            mod = {"use_mod": args["use_mod"], "ntokens_mod": args.get("ntokens_mod"), "vocab_mod": {"<pad>": 2}}
            model = MultiOmicTransformerModel(**options, **mod)
    state = torch.load(folder / "best_model.pt", map_location="cpu", weights_only=True)
    own = {name.replace("in_proj_", "Wqkv."): tensor.shape for name, tensor in model.state_dict().items()}
    skipped = [name for name, tensor in state.items() if own.get(name) != tensor.shape]
    untouched = [name for name in own if name not in state]
    load_pretrained(model, state, verbose=False)
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    given = load_file(inputs)
    with torch.no_grad():
        said = model(
            given.pop("src"),
            given.pop("values"),
            src_key_padding_mask=given.pop("src_key_padding_mask"),
            **given,
            MVC=args["MVC"],
            CLS=not args["no_cls"],
        )
    save_file({name: tensor.contiguous() for name, tensor in said.items()}, outputs)
    print(json.dumps({"skipped": skipped, "untouched": untouched}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
