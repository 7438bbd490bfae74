FROM python:3.12-slim

RUN useradd --create-home --uid 1000 cluster \
    && install --directory --owner=cluster --group=cluster /data

WORKDIR /src
# First what changes seldom: a change of the code then installs nothing anew.
COPY constraints.txt pyproject.toml README.md ./
COPY cluster_tasks ./cluster_tasks
COPY workers ./workers
RUN pip install --no-cache-dir --constraint constraints.txt ".[consul,etcd,qdrant,retrieval,static]"

WORKDIR /app
COPY celeryconfig.py ./

USER cluster
ENV CLUSTER_DATA_DIR=/data PYTHONUNBUFFERED=1
VOLUME /data
CMD ["celery", "-A", "cluster_tasks", "worker", "-n", "worker@%h", "--loglevel", "INFO"]
