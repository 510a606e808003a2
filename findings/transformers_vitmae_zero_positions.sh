#!/usr/bin/env bash
# transformers 5.23.0: an untrained ViTMAEForPreTraining has fixed positions of nothing but zeros, and no call fills them.
#
# ViTMAE's positions are sine-cosine, not trained: a model that is built from a configuration, to be pretrained from
# scratch or to be timed as a peer, is expected to have them. In 5.23.0 both tables, encoder's and decoder's, are zero.
# The model trains, its loss falls, and it cannot know where a patch lies. `initialize_weights()` of the model leaves the
# tables as they are, too. 4.57.6 fills the encoder's when the model is built, and leaves the decoder's empty.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 transformers==5.23.0
"$folder/venv/bin/pip" install --quiet --target "$folder/old" transformers==4.57.6
cat > "$folder/zeros.py" << 'PYTHON'
from transformers import ViTMAEConfig, ViTMAEForPreTraining, __version__

sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
model = ViTMAEForPreTraining(ViTMAEConfig(image_size=32, patch_size=8, **sizes, **decoder))


def largest() -> str:
    tables = model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed
    return " ".join(f"{table.abs().max().item():.2f}" for table in tables)


print(__version__, "built:", largest())
if hasattr(model, "initialize_weights"):
    model.initialize_weights()
    print(__version__, "initialize_weights():", largest())
PYTHON
{
    HF_HUB_OFFLINE=1 PYTHONPATH="$folder/old" "$folder/venv/bin/python" "$folder/zeros.py"
    HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/zeros.py"
} 2> /dev/null | tee "$folder/seen"
diff - "$folder/seen" << 'EXPECTED'
4.57.6 built: 1.00 0.00
4.57.6 initialize_weights(): 1.00 0.00
5.23.0 built: 0.00 0.00
5.23.0 initialize_weights(): 0.00 0.00
EXPECTED
