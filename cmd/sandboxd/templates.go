package main

import (
	"fmt"

	"github.com/spf13/pflag"

	"github.com/sandboxd/sandboxd/pkg/runtime/microvm"
	"github.com/sandboxd/sandboxd/pkg/workload"
)

// templateFlags say whether VMs are cloned, and of what.
type templateFlags struct {
	on     string
	max    int
	mib    uint64
	shared bool
	label  string

	pool    int
	poolMiB uint64
}

func (t *templateFlags) register(f *pflag.FlagSet) {
	f.StringVar(&t.on, "vm-templates", "off", "on: VMs are cloned from a template of their kind, made after the first of it was booted; off: each is booted")
	f.IntVar(&t.max, "vm-templates-max", 8, "how many templates there are at most; the one not used for longest makes room")
	f.Uint64Var(&t.mib, "vm-templates-mib", 4096, "MiB of guest memory that all templates may have together")
	f.BoolVar(&t.shared, "vm-templates-shared", false, "share templates between callers and tenants, who may then learn by timing what memory others use")
	f.StringVar(&t.label, "vm-templates-label", "tenant", "label whose different values never share a template, as different callers never do")
	f.IntVar(&t.pool, "vm-pool", 0, "how many clones to keep made ahead of time, for each kind of VM that was started; needs --vm-templates on")
	f.Uint64Var(&t.poolMiB, "vm-pool-mib", 2048, "MiB of guest memory that all those may have together; kinds not started for longest make room")
}

func (t *templateFlags) check() error {
	if t.on != "on" && t.on != "off" {
		return fmt.Errorf("cannot use --vm-templates %q: it is on or off", t.on)
	}
	if t.max < 1 || t.max > 1024 {
		return fmt.Errorf("cannot use --vm-templates-max %d: it is between 1 and 1024", t.max)
	}
	if t.mib < 1 || t.mib > 1<<24 {
		return fmt.Errorf("cannot use --vm-templates-mib %d: it is between 1 and %d", t.mib, 1<<24)
	}
	if t.pool < 0 || t.pool > microvm.MaxPool {
		return fmt.Errorf("cannot use --vm-pool %d: it is between 0 and %d", t.pool, microvm.MaxPool)
	}
	if t.pool > 0 && t.on != "on" {
		return fmt.Errorf("cannot use --vm-pool %d: clones are of templates, give --vm-templates on, too", t.pool)
	}
	if t.poolMiB < 1 || t.poolMiB > 1<<24 {
		return fmt.Errorf("cannot use --vm-pool-mib %d: it is between 1 and %d", t.poolMiB, 1<<24)
	}
	return nil
}

func (t *templateFlags) config() microvm.TemplateConfig {
	return microvm.TemplateConfig{
		On: t.on == "on", Max: t.max, MaxBytes: t.mib << 20,
		Pool: microvm.PoolConfig{Size: t.pool, MaxBytes: t.poolMiB << 20},
	}
}

func (t *templateFlags) sharing() workload.TemplateSharing {
	return workload.TemplateSharing{All: t.shared, Label: t.label}
}
