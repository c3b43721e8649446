"""What the planner assumes because it cannot count it, in one place.

Each number says where it comes from. "estimate": not measured. "source": read in the code of the library named.
`smolray plan --measure` compares predictions with a measurement.
"""

# --- memory, bytes ---
CUDA_CONTEXT = 0.7e9  # estimate: CUDA context, cuBLAS and cuDNN workspaces (0.6 to 0.8 GB)
NCCL_BUFFERS = 0.2e9  # estimate: where there is more than one worker
# estimate: what the allocator reserves on top of what it hands out, as a share of it, with expandable segments, which
# workers set (engine/allocator.py). Its segments of fixed sizes took 15 to 22 % on a CUDA runtime without a card.
FRAGMENTATION = 0.05
HEADROOM = 0.05  # estimate: share of a GPU's memory left free for the prediction error
# source: engine/zero.py, reduce_bucket_size: values in the dtype of the gradients; fewer where fewer are trained
REDUCE_BUCKET = 500_000_000
LIVE_PARAMETERS = 1_000_000_000  # source: deepspeed 0.19.8, stage3_max_live_parameters and stage3_max_reuse_distance
ADAM_MOMENTS = 8.0  # two fp32 moments a parameter
ADAM_8BIT_MOMENTS = 2 * (1 + 4 / 256)  # source: bitsandbytes, int8 with an fp32 absmax a block of 256
OFFLOADED_GRADIENT = 4.0  # source: deepspeed 0.19.8: fp32 gradients go to the host, 16-bit weights come back
# source: deepspeed 0.19.8: bytes on the host of an offloaded parameter: fp32 master, two moments and gradient, and the
# 16-bit gradient before it
OFFLOADED = 18.0
DECODING_SHARE = 0.8  # of the free memory: the rest is for tiles, masks, logits and what the allocator cannot join
MASTER = 4.0  # fp32 copy of a trained 16-bit weight
PIPELINE_GRADIENT = 4.0  # estimate: the pipeline engine sums gradients in fp32

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
# measured on a CPU: bytes a second of large tensors whose memory is allocated anew each time; GPU allocators keep it
HOST_FRESH_BYTES = 2e9
ATTENTION_BACKWARD = (
    2.5  # flash attention's backward pass recomputes the scores: five products to the two of the forward pass
)
# estimate: host seconds of a layer's forward pass
LAUNCH_SECONDS = {"vision_embeddings": 2e-4, "vision": 2e-4, "merge": 4e-4, "text": 3.5e-4, "head": 4e-4}
LORA_LAUNCHES = 2.0  # estimate: adapters double the kernels of a layer
LINK_SHARE = 0.85  # measured with gloo at 1 Gbit/s and 100 Mbit/s between namespaces: 0.87 to 0.91, 0.79 to 0.83
PCIE_BYTES = 10e9  # estimate: bytes a second between a GPU and its host
# bytes of a parameter: master and two moments read and written, gradient read and converted, weight written
OPTIMIZER_TRAFFIC = 44.0
CPU_ADAM_PARAMETERS = 2.5e8  # estimate: parameters a second of torch's AdamW on the CPU, one thread
ZERO3_LAYER_SECONDS = 1e-3  # estimate: DeepSpeed's hooks around the modules of one layer, for one pass
# measured with gloo on CPUs that also compute: the hooks and the small collectives of one layer
ZERO3_HOST_LAYER_SECONDS = 1e-2
PIPELINE_STEP_SECONDS = 5e-2  # estimate: a new schedule for another bucket of sizes, messages of the host
STEP_OVERHEAD = 5e-3  # estimate: norm, finite checks, logging
TILE_SECONDS = 8e-3  # estimate: decoding, scaling and cutting one tile on one core
SAMPLE_SECONDS = 3e-4  # estimate: tokens and collation of one conversation on one core
