# syntax=docker/dockerfile:1
# One image for the Flex Template launcher and the Dataflow workers, in three targets: tpu, cuda and cpu.
#
#   docker buildx build --target tpu --tag IMAGE --push .
#
# IMAGE is Terraform's output sdk_container_image. Weights come from the bucket; to bake them in instead, add
# --build-context weights=FOLDER and launch with --model /opt/sdjax/weights.

ARG PYTHON_IMAGE=python:3.11.15-slim-bookworm
ARG BEAM_IMAGE=apache/beam_python3.11_sdk:2.77.0
ARG LAUNCHER_IMAGE=gcr.io/dataflow-templates-base/python311-template-launcher-base:20240812-rc01

FROM ${BEAM_IMAGE} AS beam
FROM ${LAUNCHER_IMAGE} AS launcher
FROM scratch AS weights

FROM ${PYTHON_IMAGE} AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY sdjax sdjax
COPY pipelines pipelines
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM ${PYTHON_IMAGE} AS base
ENV PYTHONUNBUFFERED=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    FLEX_TEMPLATE_PYTHON_PY_FILE=/opt/sdjax/flex_template.py
WORKDIR /opt/sdjax
COPY --from=beam /opt/apache/beam /opt/apache/beam
COPY --from=launcher /opt/google/dataflow/python_template_launcher /opt/google/dataflow/python_template_launcher
COPY docker/requirements.txt ./
RUN pip install --no-cache-dir --no-deps --requirement requirements.txt
COPY docker/health.py docker/flex_template.py docker/entrypoint.py ./
COPY --from=weights / weights/
# By hand, docker run --privileged --entrypoint python IMAGE health.py says whether an image can run the jobs, and where.
ENTRYPOINT ["/opt/apache/beam/boot"]

# tpu and cuda run as root: Dataflow mounts the worker's scratch folders as root's, and /dev/vfio opens for root alone.
# Each names one platform: a worker without its accelerator fails, where JAX would go on on the processor, as it would
# with cuda,cpu. Without a GPU all that it says is AssertionError. A launcher asks for no device.
FROM base AS tpu
ENV JAX_PLATFORMS=tpu
COPY docker/requirements-tpu.txt ./
RUN pip install --no-cache-dir --no-deps --requirement requirements-tpu.txt
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-deps /wheels/*.whl && pip check
ENTRYPOINT ["python", "/opt/sdjax/entrypoint.py"]

FROM base AS cuda
# The second: where Dataflow mounts the driver that it installs.
ENV JAX_PLATFORMS=cuda \
    LD_LIBRARY_PATH=/usr/local/nvidia/lib64
COPY docker/requirements-cuda.txt ./
RUN pip install --no-cache-dir --no-deps --requirement requirements-cuda.txt
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-deps /wheels/*.whl && pip check

# For a laptop, or as a worker of another runner.
FROM base AS cpu
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-deps /wheels/*.whl && pip check
RUN useradd --create-home --uid 10001 sdjax
USER 10001
