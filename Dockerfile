# perta_fast in a container; docs/install.md says how to run it.
#
#   docker build --tag perta .
#   docker build --tag perta:cuda --build-arg VARIANT=cuda .     with the CUDA kernels, and torch for NVIDIA GPUs
ARG VARIANT=cpu

# Where the wheel is built: with a compiler, which the image itself does not need.
FROM python:3.12-slim-trixie AS build-cpu
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
ENV PERTA_CUDA=0

FROM nvidia/cuda:13.0.1-devel-ubuntu24.04 AS build-cuda
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
ENV PERTA_CUDA=1

# hadolint ignore=DL3006
FROM build-${VARIANT} AS build
WORKDIR /source
COPY . .
RUN python3 -m venv /build && /build/bin/pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

# torch comes first and exactly, so that nothing later chooses another build of it.
FROM python:3.12-slim-trixie AS torch-cpu
RUN pip install --no-cache-dir torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu

FROM python:3.12-slim-trixie AS torch-cuda
RUN pip install --no-cache-dir torch==2.13.0 --index-url https://download.pytorch.org/whl/cu130

# hadolint ignore=DL3006
FROM torch-${VARIANT}
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir "$(echo /wheels/*.whl)[tune,eval,plots,data]"
RUN useradd --create-home --uid 1000 perta && install --directory --owner perta /work
USER 1000
WORKDIR /work
ENTRYPOINT ["perta"]
CMD ["--help"]
