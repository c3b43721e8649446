"""What the planner assumes and cannot count, in one place.

Each number says where it comes from; `smolray plan --measure` checks them.

"estimate": not measured by us. "source": read in the code of the library named.
"""

# --- memory, bytes ---
CUDA_CONTEXT = 0.7e9  # estimate: CUDA context, cuBLAS and cuDNN workspaces (0.6 to 0.8 GB)
NCCL_BUFFERS = 0.2e9  # estimate: where there is more than one worker
FRAGMENTATION = 0.05  # estimate: share of what the allocator hands out, on top of it
HEADROOM = 0.05  # estimate: share of a card left free, for predictions err
# source: engine/zero.py, reduce_bucket_size: at most so many values, or all that are trained; in the dtype of the
# gradients
REDUCE_BUCKET = 500_000_000
LIVE_PARAMETERS = 1_000_000_000  # source: deepspeed 0.19.8, stage3_max_live_parameters and stage3_max_reuse_distance
ADAM_MOMENTS = 8.0  # two fp32 moments a parameter
ADAM_8BIT_MOMENTS = 2 * (1 + 4 / 256)  # source: bitsandbytes, int8 with an fp32 absmax a block of 256
MASTER = 4.0  # fp32 copy of a trained 16-bit weight
PIPELINE_GRADIENT = 4.0  # estimate: the pipeline engine adds gradients up in fp32

# --- time ---
MATMUL_SHARE_PUBLISHED = 0.5  # estimate: share of the maker's dense TFLOP/s that a layer's matrix products reach
# measured on a CPU: share of the speed of a large square matmul that a layer's products reach
MATMUL_SHARE_MEASURED = 0.7
BANDWIDTH_SHARE = 0.75  # estimate: share of the maker's memory bandwidth that elementwise kernels reach
# Elementwise traffic of a layer's forward pass in units of the bytes a full training saves of it, added up over
# transformers' eager kernels.
TRAFFIC = {"vision": 1.2, "text": 3.2}
BACKWARD_TRAFFIC = 2.0  # estimate: the backward pass's elementwise traffic, in units of the forward's
GRADIENT_TRAFFIC = 4.0  # a gradient is written, read, and added to the sum, which is read and written
# measured on a CPU: bytes a second of large tensors in memory that the allocator gets anew each time; a GPU's is kept
HOST_FRESH_BYTES = 2e9
ATTENTION_BACKWARD = 2.5  # flash attention's backward computes the scores again: five products for the forward's two
# estimate: host time of a layer's forward
LAUNCH_SECONDS = {"vision_embeddings": 2e-4, "vision": 2e-4, "merge": 4e-4, "text": 3.5e-4, "head": 4e-4}
LORA_LAUNCHES = 2.0  # estimate: adapters double the kernels of a layer
LINK_SHARE = 0.85  # measured with gloo at 1 Gbit/s and 100 Mbit/s between namespaces: 0.87 to 0.91, 0.79 to 0.83
PCIE_BYTES = 10e9  # estimate: bytes a second between a card and its host
# bytes a parameter: master, two moments read and written, gradient read and converted, weight written
OPTIMIZER_TRAFFIC = 44.0
CPU_ADAM_PARAMETERS = 2.5e8  # estimate: parameters a second of torch's AdamW on the CPU, one thread
ZERO3_LAYER_SECONDS = 1e-3  # estimate: DeepSpeed's hooks around the modules of one layer, a pass
# measured with gloo on CPUs that compute beside it: the same, and a layer's small collectives
ZERO3_HOST_LAYER_SECONDS = 1e-2
PIPELINE_STEP_SECONDS = 5e-2  # estimate: a schedule made anew for another bucket, messages of the host
STEP_OVERHEAD = 5e-3  # estimate: norm, finite checks, logging
TILE_SECONDS = 8e-3  # estimate: decoding, scaling and cutting one tile on one core
SAMPLE_SECONDS = 3e-4  # estimate: tokens and collation of one conversation on one core
