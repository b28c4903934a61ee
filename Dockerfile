# The image of a server or a site: docker build --tag prelort .
FROM python:3.12-slim

RUN apt-get update \
    && apt-get install --yes --no-install-recommends openssl openssh-client \
    && rm -rf /var/lib/apt/lists/*

# As in the Makefile; for the build of your GPU: --build-arg TORCH="torch==2.13.0 --index-url ...".
ARG TORCH=torch==2.13.0
RUN pip install --no-cache-dir $TORCH

COPY pyproject.toml README.md LICENSE /source/
COPY src /source/src
RUN pip install --no-cache-dir /source

# A federation's folder (prelort new) is mounted here. Any user may run it.
WORKDIR /federation
ENV HOME=/tmp
