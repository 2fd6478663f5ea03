# The controller, which also publishes the table: no torch, no GPU, no SGLang.
# Build from the repository's root: docker build -f deploy/container/controller.Dockerfile .
FROM python:3.12-slim AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY sglang_alloc ./sglang_alloc
COPY kernels ./kernels
COPY controller ./controller
RUN python -m venv /opt/sglang-alloc \
 && /opt/sglang-alloc/bin/pip install --no-cache-dir .

FROM python:3.12-slim
COPY --from=build /opt/sglang-alloc /opt/sglang-alloc
ENV PATH=/opt/sglang-alloc/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
EXPOSE 9464
ENTRYPOINT []
CMD ["sglang-alloc-controller", "run", "--config", "/etc/sglang-alloc/controller.yaml"]
