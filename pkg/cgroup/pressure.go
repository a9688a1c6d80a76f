package cgroup

import (
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// readPressure reads a group's PSI file, nil where the kernel has none. Format: Documentation/accounting/psi.rst.
func readPressure(path string) *spec.Pressure {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil
	}
	p := &spec.Pressure{}
	for line := range strings.Lines(string(b)) {
		words := strings.Fields(line)
		if len(words) == 0 {
			continue
		}
		avg, total := &p.SomeAvg10, &p.SomeTotal
		if words[0] == "full" {
			avg, total = &p.FullAvg10, &p.FullTotal
		}
		for _, w := range words[1:] {
			key, value, _ := strings.Cut(w, "=")
			switch key { // the kernel's own numbers: they parse
			case "avg10":
				*avg, _ = strconv.ParseFloat(value, 64)
			case "total":
				us, _ := strconv.ParseInt(value, 10, 64)
				*total = time.Duration(us) * time.Microsecond
			}
		}
	}
	return p
}
