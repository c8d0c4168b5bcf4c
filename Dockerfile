# An image for a node with NVIDIA GPUs. It has not been built or run here: no machine of the project has a container engine.
#   docker build -t spear-jax .
#   docker run --gpus all -v "$PWD:/work" spear-jax train --config=quickstart --workdir=runs/quickstart
# The node needs NVIDIA's driver and its container toolkit. CUDA comes from JAX's own packages (the extra cuda), so that a plain
# Python image is enough. The current folder is /work inside: run folders and config files lie there.

FROM python:3.12-slim AS wheel
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir "$(echo /wheels/spear_jax-*.whl)[cuda]"
# models, datasets and compiled programs; mount a volume here to keep them
ENV HF_HOME=/cache/huggingface \
    JAX_COMPILATION_CACHE_DIR=/cache/compiled \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /work
ENTRYPOINT ["spear-jax"]
CMD ["--help"]
