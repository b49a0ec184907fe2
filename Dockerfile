FROM python:3.11-slim-bookworm

RUN apt-get update \
    && apt-get install --yes --no-install-recommends git openssh-client procps rsync \
    && rm -rf /var/lib/apt/lists/*

RUN python -m venv /opt/loraseg
ENV PATH=/opt/loraseg/bin:$PATH

WORKDIR /src
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY loraseg loraseg
COPY actors actors
COPY jobs jobs
RUN pip install --no-cache-dir --constraint constraints.txt .
# Serve's proxies answer with the API's error format if a gateway replica is lost.
ENV RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=actors.proxying:middlewares

WORKDIR /root
