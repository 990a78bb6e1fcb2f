"""Faults in how lost, slow and wrong engines are treated.  Rows of `make test-mutants`."""

from tests.plant import Mutant

R, T = "megatron_plugin/rollout/", "megatron_plugin/trainer/"
FLEET, LOST, HTTP = "tests/rollout/test_fleet.py", "tests/rollout/test_fleet_losses.py", "tests/rollout/test_vllm_http.py"
REWARDS, ROLLOUTS, SERVE, SCORES = "tests/rollout/test_rewards.py", "tests/trainer/test_rollouts.py", "tests/rollout/test_serve.py", "tests/rollout/test_prompt_scores.py"
POOL, STEPS, EVAL, PROCESS = "tests/rollout/test_worker_pool.py", "tests/trainer/test_onpolicy_steps.py", "tests/trainer/test_evaluating.py", "tests/rollout/test_vllm_process.py"
MUTANTS = [
    Mutant("an engine that misses one probe is dead", R + "slots.py", "if self.missed >= PROBES:", "if self.missed >= 1:", f"{FLEET} -k suspect_and_in_the_end"),
    Mutant("an engine that misses one deadline is dead", R + "slots.py", "DEADLINES = 2", "DEADLINES = 1", f"{LOST} -k one_deadline"),
    Mutant("an engine that answers again stays suspect", R + "slots.py", "        self.suspicion, self.missed, self.probe_at = None, 0, math.inf\n", "", f"{LOST} -k one_deadline --timeout=60"),
    Mutant("what failed is asked again at once", R + "slots.py", "return min(LONGEST_S, ", "return 0 * min(LONGEST_S, ", f"{LOST} -k waits_double"),
    Mutant("waits grow without end", R + "slots.py", "return min(LONGEST_S, ", "return min(1e9, ", f"{LOST} -k waits_double"),
    Mutant("what failed is asked again for ever", R + "dispatch.py", "        if self.failed[key] > RETRIES:\n", "        if False:\n", f"{LOST} -k on_the_way --timeout=60"),
    Mutant("what failed on the way is never asked again", R + "dispatch.py", "RETRIES = 5", "RETRIES = 0", f"{LOST} -k on_the_way"),
    Mutant("what waits to be asked again is forgotten", R + "dispatch.py", "            self.pending.extend(request for _, request in self.waiting)\n", "", f"{LOST} -k wait_to_be_asked"),
    Mutant("a wrong number of completions is asked again", R + "vllm_answer.py", 'raise EngineError(f"{engine}: got completions numbered', 'raise EngineBusyError(f"{engine}: got completions numbered', f"{HTTP} -k that_are_none"),
    Mutant("a log-probability above 0 is taken", R + "vllm_answer.py", " and value <= ABOVE_0", "", f"{HTTP} -k that_are_none"),
    Mutant("a token beyond the vocabulary is taken", R + "vllm_answer.py", " or not 0 <= token < vocab_size), None)", "), None)", f"{HTTP} -k that_are_none"),
    Mutant("an answer may come a byte at a time for ever", R + "vllm_wire.py", "if time.monotonic() > end:", "if False:", f"{HTTP} -k without_end"),
    Mutant("HTTP 500 is the last word about a prompt", R + "vllm_wire.py", "raise EngineBusyError(reason) if self.healthy() else EngineLostError(reason)", "raise EngineError(reason) if self.healthy() else EngineLostError(reason)", f"{HTTP} -k refusal_is_not_a_loss"),
    Mutant("a second trainer takes the server over", R + "lease.py", "and now - self.seen < LEASE_S", "and False", f"{HTTP} -k second_trainer"),
    Mutant("a trainer that ends keeps its server", R + "lease.py", '            self.owner = ""\n', "            pass\n", f"{HTTP} -k second_trainer"),
    Mutant("a lease never ends", R + "lease.py", "and now - self.seen < LEASE_S", "", f"{HTTP} -k loses_its_server"),
    Mutant("a port that is taken is vLLM's to find out", R + "serve.py", "    check_port(host, port)\n    print(", "    print(", f"{SERVE} -k taken"),
    Mutant("random weights are scored", R + "prompt_scores.py", "if str(version).isdigit():", "if True:", f"{SCORES} -k whose"),
    Mutant("a reward that fails does not say where", R + "reward_worker.py", ' + (_place(error) if task["kind"] == "user" else "")', "", f"{REWARDS} -k always_fails"),
    Mutant("a log fills the disk", R + "server_log.py", "    os.truncate(path, 0)\n", "", "tests/rollout/test_vllm_process.py -k behind_its_writer"),
    Mutant("a log whose end cannot be kept fills the disk", R + "server_log.py", "with contextlib.suppress(OSError), path.open", "with path.open", f"{PROCESS} -k cannot_be_kept"),
    Mutant("a server taken for dead is sent the version that it has", T + "engines.py", "            self.recover()\n", "            self.leaders.on_leaders(self._restart)\n            self.sync.send(self.fleet, self.transport, self.version)\n", f"{ROLLOUTS} -k taken_for_dead"),
    Mutant("127.0.0.2 is another machine", T + "engines.py", "not is_loopback(urlsplit(url).hostname or \"\")", "urlsplit(url).hostname not in (\"127.0.0.1\", \"localhost\")", f"{ROLLOUTS} -k taken_for_dead"),
    Mutant("a reward worker killed while it waits ends the run", R + "worker_pool.py", "contextlib.suppress(BrokenPipeError)", "contextlib.nullcontext()", f"{POOL} -k killed_while"),
    Mutant("padding of the vocabulary is taken for a token", R + "vllm_answer.py", "params.vocab_size or vocab_size", "vocab_size", f"{HTTP} -k padding"),
    Mutant("engines are not told the tokenizer's size", T + "rollouts.py", "vocab_size=self.run.data.vocab_size, **cut", "**cut", f"{STEPS} -k padding"),
    Mutant("a stray label leaves the other ranks waiting", T + "onpolicy.py", "        self.leaders.raise_first(own)\n", "        if own is not None:\n            raise own\n", f"{STEPS} -k beyond_the_vocabulary"),
    Mutant("a supervised checkpoint is found out after the engines started", T + "onpolicy.py", "if run.position is not None and not {", "if False and not {", f"{STEPS} -k supervised"),
    Mutant("a signal drops updates of a batch and nobody is told", T + "onpolicy.py", "if self.pending and (self.guard.signal", "if False and (self.guard.signal", f"{STEPS} -k signal_between"),
    Mutant("whoever keeps the best is told of updates dropped", T + "onpolicy.py", "if self.pending and (self.guard.signal or", "if self.pending and (True or", f"{STEPS} -k signal_between"),
    Mutant("the best is saved between the updates of a batch", "megatron_plugin/config/rollout_checks.py", "if config.checkpoint.best and config.train.eval_interval % rollout.updates:", "if False:", "tests/test_rollout_checks.py"),
    Mutant("eval finds out about top_p from vLLM", T + "evaluating.py", "if not 0 < task.top_p <= 1:", "if False:", f"{EVAL} -k before_vllm"),
    Mutant("numbers.json holds NaN", T + "answer_numbers.py", "x if x is not None and math.isfinite(x) else None for", "x for", "tests/trainer/test_answer_numbers.py"),
    Mutant("a batch is sampled that nobody trains on", T + "rollouts.py", "return after >= config.train.steps or any(", "return any(", f"{ROLLOUTS} -k evaluation_waits"),
    Mutant("an engine process whose parent is gone already is not ended", R + "watchdog.py", 'orphan = parent == 1 and owner != "1"', "orphan = False", f"{PROCESS} -k gone_already"),
    Mutant("a server's context may be longer than the model's", R + "vllm_model.py", "if asked < 0 or (own and asked > own):", "if asked < 0:", f"{SERVE} -k longer"),
    Mutant("a server's context is 32768 whatever the model's", R + "vllm_model.py", "min(LONGEST, own or LONGEST)", "LONGEST", f"{SERVE} -k none_is_asked"),
]
