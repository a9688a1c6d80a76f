package main

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/pflag"
	"go.yaml.in/yaml/v3"

	"github.com/sandboxd/sandboxd/pkg/audit"
	"github.com/sandboxd/sandboxd/pkg/metrics"
	"github.com/sandboxd/sandboxd/pkg/runtime/container"
	"github.com/sandboxd/sandboxd/pkg/workload"
)

// maxConfigBytes bounds the config file: more is a mistake.
const maxConfigBytes = 1 << 20

// config is what the daemon is told, by flags or by the file of --config, whose keys are the flags' names.
type config struct {
	configFile  string
	listen      string
	socketGroup string
	stateDir    string
	runDir      string
	idDir       string
	policy      string
	access      string
	auditLog    string
	auditSize   bytesValue
	auditKeep   int
	admission   struct {
		memory, disk bytesValue
		pids         uint64
		perCaller    int
	}
	metrics     string
	tlsCert     string
	tlsKey      string
	tlsClientCA string
	vmAccel     string
	vmKVMTrial  time.Duration
	vmKernel    string
	templates   templateFlags
	snapshots   snapshotFlags
	agent       string
	vsockHelper string
	cgroup      string
	cniConfDir  string
	cniPlugins  []string
	logLevel    string
	logFormat   string
	trace       string
	agentPool   int
	version     bool
	help        bool
	man         bool
}

// notInFile are flags that make no sense as keys of the config file.
var notInFile = []string{"config", "version", "help", "man"}

func (c *config) flags() *pflag.FlagSet {
	f := pflag.NewFlagSet("sandboxd", pflag.ContinueOnError)
	f.SortFlags = false
	f.StringVar(&c.configFile, "config", "", "YAML file whose keys are the names of these flags; a flag that is given wins")
	f.StringVar(&c.listen, "listen", "unix:///run/sandboxd/sandboxd.sock", "socket to answer on; one passed by systemd wins. After a comma also tcp://HOST:PORT, which needs --access and the --tls flags")
	f.StringVar(&c.socketGroup, "socket-group", "", "group whose members may call the daemon, besides root")
	f.StringVar(&c.stateDir, "state-dir", "/var/lib/sandboxd", "directory of images, records, logs and writable layers")
	f.StringVar(&c.runDir, "run-dir", "/run/sandboxd", "directory of what does not outlive a boot")
	f.StringVar(&c.idDir, "id-dir", "/run/sandboxd/ids", "directory in which all daemons of this host share out user ids")
	f.StringVar(&c.policy, "policy", "", "policy file; without one callers choose the isolation, and auto means vm")
	f.StringVar(&c.access, "access", "", "file of roles: who may do what; without one whoever the socket's mode lets in may do everything. SIGHUP reads it again")
	c.auditSize = 64 << 20
	f.StringVar(&c.auditLog, "audit-log", "", "file with a line of JSON of every call that changes something (default: audit/audit.log in the state directory); none for none")
	f.Var(&c.auditSize, "audit-log-size", "size at which it is rotated")
	f.IntVar(&c.auditKeep, "audit-log-keep", 15, "how many rotated ones are kept")
	c.admission.disk = 256 << 20
	f.Var(&c.admission.memory, "max-memory", "memory that all workloads with a sandbox may use together; 0 for no bound")
	f.Uint64Var(&c.admission.pids, "max-pids", 0, "processes they may have together; 0 for no bound")
	f.IntVar(&c.admission.perCaller, "max-workloads-per-caller", 10000, "workloads of one user or certificate, in whatever state; 0 for no bound")
	f.Var(&c.admission.disk, "min-disk-free", "what a creation or a start must leave of the disk behind the state directory; 0 for nothing")
	f.StringVar(&c.metrics, "metrics-addr", "", "where to show metrics to Prometheus: an address of this host alone, such as 127.0.0.1:9464, or unix:///run/sandboxd/metrics.sock; none when empty")
	f.StringVar(&c.tlsCert, "tls-cert", "", "certificate to show over TCP, PEM; read again when it changes, as the next two")
	f.StringVar(&c.tlsKey, "tls-key", "", "its key")
	f.StringVar(&c.tlsClientCA, "tls-client-ca", "", "authorities whose certificates callers over TCP must show")
	f.StringVar(&c.vmAccel, "vm-accel", "kvm", "how VMs run: kvm, tcg (software emulation, for development), or auto (kvm where it works)")
	f.DurationVar(&c.vmKVMTrial, "vm-kvm-trial", 10*time.Second, "how long the guest that tries KVM out may take; a host that is itself emulated needs more")
	f.StringVar(&c.vmKernel, "vm-kernel", "", "guest kernel, a vmlinuz; searched for when empty")
	c.templates.register(f)
	c.snapshots.register(f)
	f.StringVar(&c.agent, "agent", "", "path of sandbox-agent (default: beside this program, else in "+libexec+")")
	f.StringVar(&c.vsockHelper, "vsock-helper", "", "path of sandbox-vsock (default: beside this program, else in "+libexec+")")
	f.StringVar(&c.cniConfDir, "cni-conf-dir", "/etc/cni/net.d", "directory of the networks workloads may join: CNI's *.conflist files")
	f.StringSliceVar(&c.cniPlugins, "cni-plugin-dir", []string{"/usr/lib/cni"}, "directories of CNI plugins, the first that has one wins")
	f.StringVar(&c.cgroup, "cgroup-parent", "sandboxd", "cgroup below which every sandbox has its own")
	f.IntVar(&c.agentPool, "agent-pool", 0, "how many container sandboxes to keep made ahead of time, for a faster start; each costs about 3 MiB of memory")
	f.StringVar(&c.logLevel, "log-level", "info", "debug, info, warn or error")
	f.StringVar(&c.logFormat, "log-format", "console", "console or json")
	f.StringVar(&c.trace, "trace", "", "file to append the time of every phase of every sandbox to, for measuring; see make bench-trace")
	f.BoolVar(&c.version, "version", false, "print the version and exit")
	f.BoolVarP(&c.help, "help", "h", false, "print this and exit")
	f.BoolVar(&c.man, "man", false, "print the manual page and exit")
	// For the package's build.
	_ = f.MarkHidden("man")
	return f
}

// parseConfig reads the command line and then, below it, the config file.
func parseConfig(args []string) (config, *pflag.FlagSet, error) {
	var c config
	f := c.flags()
	if err := f.Parse(args); err != nil {
		return c, f, err
	}
	if f.NArg() > 0 {
		return c, f, fmt.Errorf("cannot use argument %q: sandboxd takes only flags; see sandboxd --help", f.Arg(0))
	}
	if c.configFile != "" {
		if err := readConfigFile(c.configFile, f); err != nil {
			return c, f, err
		}
	}
	return c, f, c.check()
}

// readConfigFile sets each flag that the file names and the command line did not.
func readConfigFile(path string, f *pflag.FlagSet) error {
	file, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("cannot read config file: %w", err)
	}
	defer file.Close()
	source, err := io.ReadAll(io.LimitReader(file, maxConfigBytes+1))
	if err != nil {
		return fmt.Errorf("cannot read config file: %w", err)
	}
	if len(source) > maxConfigBytes {
		return fmt.Errorf("cannot read config file %s: it is larger than %d bytes", path, maxConfigBytes)
	}
	var values map[string]yaml.Node
	if err := yaml.Unmarshal(source, &values); err != nil {
		return fmt.Errorf("cannot read config file %s: %w", path, err)
	}
	for _, key := range slices.Sorted(maps.Keys(values)) {
		node := values[key]
		flag := f.Lookup(key)
		switch {
		case flag == nil || slices.Contains(notInFile, key):
			return fmt.Errorf("cannot use config file %s: line %d: unknown key %q; the keys are the flags of sandboxd --help", path, node.Line, key)
		case node.Kind != yaml.ScalarNode || node.Tag == "!!null":
			return fmt.Errorf("cannot use config file %s: line %d: %s must have one plain value", path, node.Line, key)
		case flag.Changed:
			continue
		}
		// Not FlagSet.Set: that would mark the flag as given on the command line.
		if err := flag.Value.Set(node.Value); err != nil {
			return fmt.Errorf("cannot use config file %s: line %d: %s: %w", path, node.Line, key, err)
		}
	}
	return nil
}

func (c *config) check() error {
	if _, _, err := c.addresses(); err != nil {
		return err
	}
	for _, dir := range []struct{ flag, path string }{{"state-dir", c.stateDir}, {"run-dir", c.runDir}, {"id-dir", c.idDir}} {
		if !filepath.IsAbs(dir.path) {
			return fmt.Errorf("cannot use --%s %q: give an absolute path", dir.flag, dir.path)
		}
	}
	if err := c.checkCNI(); err != nil {
		return err
	}
	if !slices.Contains([]string{"kvm", "auto", "tcg"}, c.vmAccel) {
		return fmt.Errorf("cannot use --vm-accel %q: it is kvm, auto or tcg", c.vmAccel)
	}
	if !slices.Contains([]string{"console", "json"}, c.logFormat) {
		return fmt.Errorf("cannot use --log-format %q: it is console or json", c.logFormat)
	}
	if c.vmKVMTrial < time.Second || c.vmKVMTrial > 10*time.Minute {
		return fmt.Errorf("cannot use --vm-kvm-trial %v: it is between 1s and 10m", c.vmKVMTrial)
	}
	if c.agentPool < 0 || c.agentPool > container.MaxPool {
		return fmt.Errorf("cannot use --agent-pool %d: it is between 0 and %d", c.agentPool, container.MaxPool)
	}
	if c.metrics != "" {
		if err := metrics.CheckAddress(c.metrics); err != nil {
			return fmt.Errorf("cannot use --metrics-addr: %w", err)
		}
	}
	if c.admission.perCaller < 0 {
		return errors.New("cannot use --max-workloads-per-caller: it is 0 or more")
	}
	if c.auditLog != "" && c.auditLog != noAudit && !filepath.IsAbs(c.auditLog) {
		return fmt.Errorf("cannot use --audit-log %q: give an absolute path, or %s", c.auditLog, noAudit)
	}
	if c.auditSize < audit.MinSizeBytes || c.auditKeep < 1 {
		return fmt.Errorf("cannot use --audit-log-size %s with --audit-log-keep %d: at least 1m and 1 are needed", c.auditSize.String(), c.auditKeep)
	}
	if err := c.snapshots.check(); err != nil {
		return err
	}
	if err := c.templates.check(); err != nil {
		return err
	}
	if c.cgroup == "" || strings.Contains(c.cgroup, "..") || strings.HasPrefix(c.cgroup, "/") {
		return fmt.Errorf("cannot use --cgroup-parent %q: give a name, or a relative path that stays below", c.cgroup)
	}
	return nil
}

func (c *config) admissionBounds() workload.Admission {
	return workload.Admission{
		MemoryBytes: uint64(c.admission.memory), Pids: c.admission.pids,
		DiskFreeBytes: uint64(c.admission.disk), WorkloadsPerCaller: c.admission.perCaller,
	}
}

func (c *config) checkCNI() error {
	if !filepath.IsAbs(c.cniConfDir) {
		return fmt.Errorf("cannot use --cni-conf-dir %q: give an absolute path", c.cniConfDir)
	}
	if len(c.cniPlugins) == 0 {
		return errors.New("cannot use --cni-plugin-dir: give at least one directory")
	}
	for _, dir := range c.cniPlugins {
		if !filepath.IsAbs(dir) || strings.Contains(dir, ":") {
			return fmt.Errorf("cannot use --cni-plugin-dir %q: give an absolute path without a colon", dir)
		}
	}
	return nil
}

// maxSocketPath is what a sockaddr_un holds, its final NUL counted.
const maxSocketPath = 107

// addresses are the path of the Unix socket and the host:port pairs to listen on.
func (c *config) addresses() (socket string, tcp []string, err error) {
	for address := range strings.SplitSeq(c.listen, ",") {
		if hostPort, ok := strings.CutPrefix(address, "tcp://"); ok {
			if _, _, err := net.SplitHostPort(hostPort); err != nil {
				return "", nil, fmt.Errorf("cannot listen on %q: %w: give an address such as tcp://10.0.0.1:7443", address, err)
			}
			tcp = append(tcp, hostPort)
			continue
		}
		path, ok := strings.CutPrefix(address, "unix://")
		if !ok || !filepath.IsAbs(path) || socket != "" {
			return "", nil, fmt.Errorf("cannot listen on %q: give one address such as unix:///run/sandboxd/sandboxd.sock, and beside it those such as tcp://10.0.0.1:7443", c.listen)
		}
		if len(path) > maxSocketPath {
			return "", nil, fmt.Errorf("cannot listen on %q: the kernel allows socket paths of at most %d bytes", address, maxSocketPath)
		}
		socket = path
	}
	if socket == "" {
		return "", nil, fmt.Errorf("cannot listen on %q: it needs a Unix socket too, such as unix:///run/sandboxd/sandboxd.sock", c.listen)
	}
	if len(tcp) == 0 && c.tlsCert+c.tlsKey+c.tlsClientCA != "" {
		return "", nil, errors.New("cannot use --tls-cert, --tls-key and --tls-client-ca: they are of TCP, and --listen names no address such as tcp://10.0.0.1:7443")
	}
	missing := slices.Contains([]string{c.tlsCert, c.tlsKey, c.tlsClientCA, c.access}, "")
	if len(tcp) > 0 && missing {
		return "", nil, errors.New("cannot listen on TCP: whoever can reach it must be known and have a role: give --tls-cert, --tls-key, --tls-client-ca and --access")
	}
	return socket, tcp, nil
}

// libexec is where packages put the programs that people do not call.
const libexec = "/usr/libexec/sandboxd"

// program is the path of a program of this project: as given, beside this one, or in libexec.
func program(flag, given, name string) (string, error) {
	if given != "" {
		if err := executable(given); err != nil {
			return "", fmt.Errorf("cannot use --%s: %w", flag, err)
		}
		return filepath.Abs(given)
	}
	self, err := os.Executable()
	if err != nil {
		return "", fmt.Errorf("cannot find this program: %w", err)
	}
	for _, dir := range []string{filepath.Dir(self), libexec} {
		if path := filepath.Join(dir, name); executable(path) == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("cannot find %s beside %s or in %s: install it there or name it with --%s", name, self, libexec, flag)
}

func executable(path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() || info.Mode().Perm()&0o111 == 0 {
		return errors.New(path + " is not an executable file")
	}
	return nil
}
