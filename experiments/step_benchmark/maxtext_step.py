"""The same step by MaxText, with the fastest of its settings that we found on CPU: prints one JSON line."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import time

import shape as s

ARGUMENTS = f"""
run_name=step hardware=cpu skip_jax_distributed_system=true dataset_type=synthetic enable_checkpointing=false steps={s.STEPS}
model_name=default decoder_block=llama4 mlp_activations=['silu','linear'] base_emb_dim={s.HIDDEN}
base_num_decoder_layers={s.LAYERS} base_num_query_heads={s.HEADS} base_num_kv_heads={s.KV_HEADS} head_dim={s.HEAD_DIM}
base_mlp_dim={s.EXPERT_FFN} base_moe_mlp_dim={s.EXPERT_FFN} vocab_size={s.VOCAB} max_target_length={s.LENGTH}
per_device_batch_size={s.BATCH} num_experts={s.EXPERTS} shared_experts=1 num_experts_per_tok={s.TOP_K} use_qk_norm=true
nope_layer_interval=4 interleave_moe_layer_step=1 inhomogeneous_layer_cycle_interval=4 temperature_tuning=true
chunk_attn_window_size={s.CHUNK} rope_type=llama3.1 rope_max_timescale=500000 attention=dot_product dtype=float32
enable_goodput_recording=false monitor_goodput=false sparse_matmul=true use_tokamax_gmm=false megablox=false
load_balance_loss_weight=0.01 remat_policy=minimal
""".split()


def main() -> None:
    environment = os.environ | {"DECOUPLE_GCLOUD": "TRUE", "JAX_PLATFORMS": "cpu"}
    began, seconds, start_up, log = time.time(), [], None, []
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "maxtext.trainers.pre_train.train", *ARGUMENTS, f"base_output_directory={folder}"]
        with subprocess.Popen(
            command, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            for line in process.stdout:
                log.append(line)
                if match := re.search(r"completed step: \d+, seconds: ([\d.]+)", line):
                    seconds.append(float(match[1]))
                    start_up = start_up or time.time() - began
    if len(seconds) < s.STEPS:
        sys.exit("MaxText did not finish; its last lines:\n" + "".join(log[-5:]))
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("maxtext", "jax"))
    print(json.dumps(s.summary("MaxText", versions, seconds, start_up)))


if __name__ == "__main__":
    main()
