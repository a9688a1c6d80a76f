package container

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"sync"
	"time"
)

const (
	// appArmorProfile is the name of the profile in apparmor.profile.
	appArmorProfile = "sandboxd-container"
	// appArmorPolicy is where the kernel takes profiles; it is there where AppArmor is on and securityfs mounted.
	appArmorPolicy = "/sys/kernel/security/apparmor/.replace"
	// appArmorParser makes of a profile what the kernel takes. Debian's package apparmor has it.
	appArmorParser = "apparmor_parser"
	// appArmorTimeout bounds loading one profile; it takes some ten milliseconds.
	appArmorTimeout = 20 * time.Second
)

//go:embed apparmor.profile
var appArmorSource []byte

// appArmor loads the profile of containers, where the host has AppArmor.
type appArmor struct {
	mu     sync.Mutex
	loaded bool
}

// missing says why containers of this host have no AppArmor profile, empty if they have one.
func (*appArmor) missing() string {
	if _, err := os.Stat(appArmorPolicy); errors.Is(err, fs.ErrNotExist) {
		return "the kernel has no AppArmor, or it is off"
	}
	if _, err := exec.LookPath(appArmorParser); err != nil {
		return "AppArmor is on, but " + appArmorParser + " is not installed: install the package apparmor"
	}
	return ""
}

// profile answers with the name of the profile, which it loads the first time, and with none where the host cannot have it.
// The profile stays with the kernel when the daemon ends: sandboxes go on under it.
func (a *appArmor) profile(ctx context.Context) (string, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.loaded {
		return appArmorProfile, nil
	}
	if a.missing() != "" {
		return "", nil
	}
	ctx, cancel := context.WithTimeout(ctx, appArmorTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, appArmorParser, "--replace", "--skip-cache", "--quiet")
	cmd.Stdin = bytes.NewReader(appArmorSource)
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("cannot load the AppArmor profile: %w: %q", err, bytes.TrimSpace(out))
	}
	a.loaded = true
	return appArmorProfile, nil
}
