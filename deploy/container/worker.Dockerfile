# SGLang with the plugin: the base image's torch, triton and sglang stay as they are.
# Build from the repository's root, naming an image of a supported SGLang version (docs/deploy.md):
#   docker build -f deploy/container/worker.Dockerfile --build-arg SGLANG_IMAGE=YOUR_SGLANG_IMAGE .
ARG SGLANG_IMAGE
FROM ${SGLANG_IMAGE}
COPY pyproject.toml README.md LICENSE /tmp/sglang-alloc/
COPY sglang_alloc /tmp/sglang-alloc/sglang_alloc
COPY kernels /tmp/sglang-alloc/kernels
COPY controller /tmp/sglang-alloc/controller
# `pip freeze` before and after proves that the engine's own packages did not move.
RUN python3 -m pip freeze | grep -iE '^(torch|triton|sglang|sgl-kernel)==' | sort > /tmp/before \
 && python3 -m pip install --no-cache-dir /tmp/sglang-alloc \
 && python3 -m pip freeze | grep -iE '^(torch|triton|sglang|sgl-kernel)==' | sort > /tmp/after \
 && diff /tmp/before /tmp/after \
 && rm -r /tmp/sglang-alloc /tmp/before /tmp/after
USER 10001:10001
EXPOSE 30000
ENTRYPOINT []
CMD ["sglang-alloc", "--help"]
