"""A process that owns a vLLM server, for tests that kill it:  python -m tests.rollout.vllm_owner MODEL_DIR  prints the server's URL and process id."""

import sys
import threading

from megatron_plugin.rollout.vllm_process import EngineOptions, start_server

if __name__ == "__main__":
    folder = sys.argv[1]
    options = EngineOptions(model_dir=folder, dtype="float32", max_model_len=512, kv_cache_bytes=64 << 20, transfer="gloo", log=f"{folder}/engine.log")
    # from a thread that ends: a server bound to the life of the thread that started it would die here
    started = []
    thread = threading.Thread(target=lambda: started.append(start_server(options)))
    thread.start()
    thread.join()
    print(started[0].url, started[0].popen.pid, flush=True)
    sys.stdin.read()
