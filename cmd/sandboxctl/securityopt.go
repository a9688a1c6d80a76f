package main

import (
	"fmt"
	"io"
	"os"
	"strings"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
)

// maxSeccompProfile is the API's limit of a profile. docker's own has 14 KiB.
const maxSeccompProfile = 256 << 10

// parseSecurityOpts reads what --security-opt says. Without one nothing is asked for: the default profile.
func parseSecurityOpts(list []string) (*sandboxdv1.Seccomp, error) {
	var out *sandboxdv1.Seccomp
	for _, o := range list {
		key, value, _ := strings.Cut(o, "=")
		if key != "seccomp" || value == "" {
			return nil, fmt.Errorf("cannot use --security-opt %q: write seccomp=FILE or seccomp=unconfined", o)
		}
		if out != nil {
			return nil, fmt.Errorf("cannot use --security-opt %q: there is one seccomp profile, and it was given before", o)
		}
		if value == "unconfined" {
			out = &sandboxdv1.Seccomp{Unconfined: true}
			continue
		}
		profile, err := readSeccompProfile(value)
		if err != nil {
			return nil, fmt.Errorf("cannot use --security-opt %q: %w", o, err)
		}
		out = &sandboxdv1.Seccomp{Profile: profile}
	}
	return out, nil
}

func readSeccompProfile(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxSeccompProfile+1))
	switch {
	case err != nil:
		return "", err
	case len(b) > maxSeccompProfile:
		return "", fmt.Errorf("the file has more than %d bytes", maxSeccompProfile)
	case len(strings.TrimSpace(string(b))) == 0:
		// An empty text is the default profile in the API: never what somebody meant who names a file.
		return "", fmt.Errorf("the file is empty")
	}
	return string(b), nil
}
