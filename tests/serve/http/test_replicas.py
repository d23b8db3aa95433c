"""Two replicas behind nginx, by the configuration of docs/SERVING.md."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from rrt.serve.http.server import running_server
from tests.util.servers import Served, wait_until

ROOT = Path(__file__).resolve().parents[3]
NGINX = os.environ.get("RRT_NGINX") or shutil.which("nginx")
pytestmark = pytest.mark.skipif(NGINX is None, reason="needs nginx on PATH, or its path in RRT_NGINX")

WRAPPER = """
daemon off;
master_process off;
pid nginx.pid;
error_log stderr error;
events {{}}
http {{
    access_log off;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
{block}
}}
"""


@contextlib.contextmanager
def nginx(folder, ports):
    """Run nginx by the documented block, with these replicas' ports; yields its URL."""
    (block,) = re.findall(r"^```nginx\n(.*?)^```$", (ROOT / "docs/SERVING.md").read_text(), re.M | re.S)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for documented, found in zip(("8001", "8002", "8080"), (*ports, port), strict=True):
        assert documented in block
        block = block.replace(f"127.0.0.1:{documented}", f"127.0.0.1:{found}")
    (folder / "nginx.conf").write_text(WRAPPER.format(block=block))
    process = subprocess.Popen([NGINX, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", "stderr"])
    try:
        balancer = Served(f"http://127.0.0.1:{port}", None)

        def answers():
            assert process.poll() is None
            with contextlib.suppress(ConnectionRefusedError):
                return balancer.get("/health").status == 200

        wait_until(answers)
        yield balancer
    finally:
        process.terminate()
        process.wait(60)


def test_two_replicas_share_the_load_and_one_may_go(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    flags = ["--checkpoint", str(checkpoint), "--cache-gib", "0.02", "--served-model-name", "tiny"]
    flags += ["--max-running", "2", "--max-queue", "2"]
    with (
        running_server(flags) as (first_url, first_process),
        running_server(flags) as (second_url, _),
        nginx(tmp_path, [urlsplit(url).port for url in (first_url, second_url)]) as balancer,
    ):
        replicas = [Served(url, None) for url in (first_url, second_url)]

        def open_texts():
            return [replica.get("/rrt/stats").json["texts_open"] for replica in replicas]

        def complete(index):
            return balancer.complete(prompt=[index + 1], max_tokens=20, temperature=0, ignore_eos=True)

        expected = [
            replicas[0].complete(prompt=[i + 1], max_tokens=20, temperature=0, ignore_eos=True) for i in range(8)
        ]

        def check(answers):
            for index, answer in enumerate(answers):
                assert answer.status == 200, answer.body
                assert answer.json["choices"][0]["text"] == expected[index % 8].json["choices"][0]["text"]

        # Eight at once, of which a replica takes four.
        with ThreadPoolExecutor(8) as pool:
            check(pool.map(complete, [i % 8 for i in range(40)]))
        counts = []
        for replica in replicas:
            text = replica.get("/metrics").body.decode()
            counts.append(float(re.search(r'/v1/completions",status="200"} (\S+)', text)[1]))
        assert sum(counts) == 48 and min(counts) >= 8
        # More than both take is told to come again, and breaks nothing.
        with ThreadPoolExecutor(24) as pool:
            statuses = {answer.status for answer in pool.map(complete, [i % 8 for i in range(72)])}
        assert statuses == {200, 429}
        # A stream comes as it is made, and ends at the replica with its client.
        place = urlsplit(balancer.url)
        content = json.dumps({"prompt": [1], "max_tokens": 500, "ignore_eos": True, "stream": True}).encode()
        with socket.create_connection((place.hostname, place.port), timeout=60) as connection:
            head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
            received = b""
            while b"data: " not in received:
                received += connection.recv(4096)
            assert sum(open_texts()) == 1
        wait_until(lambda: sum(open_texts()) == 0)
        # Other machines' clients, whom the proxy stands for, do not change the policy.
        assert balancer.post("/rrt/policy", {"policy": "verify"}).status == 403
        # A replica that ends, ends in order: nobody notices.
        with ThreadPoolExecutor(4) as pool:
            futures = [pool.submit(complete, index % 8) for index in range(60)]
            wait_until(lambda: sum(future.done() for future in futures) >= 10)
            first_process.send_signal(signal.SIGTERM)
            check(future.result() for future in futures)
        assert first_process.wait(60) == 0
        check([complete(0)])
