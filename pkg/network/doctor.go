package network

import (
	"fmt"
	"strings"

	"github.com/sandboxd/sandboxd/pkg/runtime"
)

// Checks are for `sandboxctl doctor`: what networks there are, and why a conflist is not one.
func (m *Manager) Checks() []runtime.Check {
	const name = "networks"
	confs, err := readConfs(m.cfg.ConfDir)
	if err != nil {
		return []runtime.Check{{Name: name, Result: "failed", Finding: err.Error(), Advice: "make " + m.cfg.ConfDir + " a directory of root's, or name another with --cni-conf-dir"}}
	}
	if len(confs) == 0 {
		return []runtime.Check{{Name: name, Result: "ok", Finding: "no conflist in " + m.cfg.ConfDir + ": workloads can have network none only"}}
	}
	var checks []runtime.Check
	for _, c := range confs {
		if c.err != nil {
			checks = append(checks, runtime.Check{Name: name, Result: "warning", Finding: fmt.Sprintf("%s is not used: %s", c.file, clip(c.err.Error())),
				Advice: "mend the file, or remove it"})
			continue
		}
		checks = append(checks, m.checkNetwork(name+": "+c.name(), c))
	}
	return checks
}

func (m *Manager) checkNetwork(name string, c conf) runtime.Check {
	plugins := pluginsOf(c.list)
	for _, p := range plugins {
		if _, err := findPlugin(p, m.cfg.PluginDirs); err != nil {
			return runtime.Check{Name: name, Result: "warning", Finding: fmt.Sprintf("%s: %v", c.file, err),
				Advice: "install the plugin as root's own, or name its directory with --cni-plugin-dir"}
		}
	}
	return runtime.Check{Name: name, Result: "ok", Finding: fmt.Sprintf("%s: plugins %s", c.file, strings.Join(plugins, ", "))}
}
