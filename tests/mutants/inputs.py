"""Faults in reading data and configurations, and in what keeps others out.  Rows of `make test-mutants`."""

from tests.plant import Mutant

LINES, PAYLOADS = "tests/faults/test_faults.py -k lines", "tests/faults/test_faults.py -k payloads"
SCAN, CONFIG, NO_NETWORK = "tests/data/test_scan.py", "tests/test_config.py", "tests/rollout/test_no_network.py"
D, C = "megatron_plugin/data/", "megatron_plugin/config/"
MUTANTS = [
    Mutant("the last of two equal keys of a line wins", D + "messages.py", "if len(found) != len(pairs):", "if False:", "tests/data/test_messages.py"),
    Mutant("a line without an end is read into memory", D + "lines.py", "if len(line) > LONGEST_LINE and", "if False and", LINES + " -k newline"),
    Mutant("a pipe is opened, and never ends", D + "lines.py", "if not stat.S_ISREG(mode := os.stat(path).st_mode) and", "if not (mode := os.stat(path).st_mode) and", "tests/faults/test_faults.py -k other"),
    Mutant("the doctor does not look at lengths", D + "scan.py", "return too_long(sample, seq_length) if seq_length and tokens > seq_length else conversation", "return conversation", SCAN),
    Mutant("bad lines beyond those shown are not counted", D + "scan.py", "            scan.bad[item.kind] += 1\n                if len(scan.first) < shown:", "            if len(scan.first) < shown:\n                    scan.bad[item.kind] += 1", SCAN),
    Mutant("a line counts twice when two stages find it bad", D + "errors.py", "if error.source is not None and error.source in self._sources:", "if False:", SCAN),
    Mutant("prompts that begin with the answer vanish", D + "prompts.py", "            unasked.append(conversation.source)\n", "", "tests/data/test_prompts.py"),
    Mutant("dropped samples are no metric", "megatron_plugin/trainer/datasets.py", "\"dropped\": len(self.train.report.dropped)}", "\"dropped\": 0}", "tests/trainer/test_data_counts.py"),
    Mutant("only the first mistake of a configuration is told", C + "errors.py", "[first.reason, *others]", "[first.reason]", CONFIG),
    Mutant("functions of OmegaConf are run", C + "load.py", "if \"${\" in REFERENCE.sub(\"\", value):", "if False:", CONFIG),
    Mutant("aliases of aliases fill the memory", C + "load.py", "sizes[id(node)] = LARGEST + 1", "sizes[id(node)] = 0", CONFIG + " -k aliases_without"),
    Mutant("a password is written into config.yaml", C + "load.py", "else LOGIN.sub(rf\"\\1{MASK}@\", value)", "else value", CONFIG),
    Mutant("an address with a password is taken", C + "rollout_checks.py", "if \"@\" in parts.netloc:", "if False:", "tests/faults/test_faults.py -k configs"),
    Mutant("the filter lets IPv4 through", "megatron_plugin/rollout/no_network.py", "(EQUAL, 1, 0, AF_UNIX)", "(AT_LEAST, 1, 0, AF_UNIX)", NO_NETWORK),
    Mutant("io_uring is a way around the filter", "megatron_plugin/rollout/no_network.py", "(EQUAL, 3, 0, IO_URING_SETUP)", "(EQUAL, 0, 0, IO_URING_SETUP)", NO_NETWORK),
    Mutant("reward workers keep the network", "megatron_plugin/rollout/reward_worker.py", "\"\" if task[\"network\"] else leave_network()", "\"\"", "tests/faults/test_faults.py -k exposure-reward"),
    Mutant("judges of ours see the keys of the environment", "megatron_plugin/rollout/worker_pool.py", "os.environ if self.task[\"kind\"] == \"user\" else", "os.environ if True else", "tests/faults/test_faults.py -k exposure-reward"),
    Mutant("code beside a tokenizer is run", D + "tokenizer.py", "trust_remote_code=False", "trust_remote_code=True", "tests/faults/test_faults.py -k payloads-tokenizer"),
]
