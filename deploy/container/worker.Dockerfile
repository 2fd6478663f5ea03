# SGLang with the plugin: the base image's torch, triton and sglang stay as they are.
# Build from the repository's root, naming an image of a supported SGLang version (docs/deploy.md):
#   docker build -f deploy/container/worker.Dockerfile --build-arg SGLANG_IMAGE=YOUR_SGLANG_IMAGE .
ARG SGLANG_IMAGE
FROM ${SGLANG_IMAGE}
COPY pyproject.toml README.md LICENSE /tmp/sglang-alloc/
COPY sglang_alloc /tmp/sglang-alloc/sglang_alloc
COPY kernels /tmp/sglang-alloc/kernels
COPY controller /tmp/sglang-alloc/controller
# The versions of the engine's own packages, before and after, prove that they did not move. A package
# that is not found fails the build, because nothing would be compared.
RUN versions="from importlib.metadata import version; [print(n, version(n)) for n in ('torch', 'triton', 'sglang', 'sglang-kernel')]" \
 && python3 -c "$versions" > /tmp/before \
 && python3 -m pip install --no-cache-dir /tmp/sglang-alloc \
 && python3 -c "$versions" > /tmp/after \
 && diff /tmp/before /tmp/after \
 && rm -r /tmp/sglang-alloc /tmp/before /tmp/after
# The user has no home folder: compiled kernels and other caches go here, as in the chart, and may be
# written by any other user too.
RUN install -d -m 1777 /cache
ENV HOME=/cache \
    USER=sglang \
    XDG_CACHE_HOME=/cache \
    TRITON_CACHE_DIR=/cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor
USER 10001:10001
EXPOSE 30000
ENTRYPOINT []
CMD ["sglang-alloc", "--help"]
