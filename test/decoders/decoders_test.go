// Package decoders sees to it that whatever reads what a sandbox or a caller made has a fuzz test, and that `make fuzz` runs it.
package decoders

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const root = "../.."

// reads are the functions by which a program of ours makes sense of bytes, by package and the beginning of their names.
var reads = map[string][]string{
	"json": {"Unmarshal", "NewDecoder"}, "proto": {"Unmarshal"}, "protojson": {"Unmarshal"}, "protowire": {"Consume"}, "tar": {"NewReader"},
	"binary": {"Read", "Uvarint", "Varint"}, "bufio": {"NewScanner"}, "fmt": {"Sscan", "Fscan"}, "unix": {"ParseSocketControlMessage", "ParseUnixRights"},
	"BigEndian": {"Uint"}, "LittleEndian": {"Uint"}, "NativeEndian": {"Uint"}, "user": {"Parse", "GetExecUser"}, "yaml": {"Unmarshal", "NewDecoder"},
}

// decoders are the functions that call those, below pkg and cmd, and some more that read without: the fuzz test of each, or why it
// needs none, which is who wrote what it reads.
var decoders = map[string]string{
	"cmd/sandboxctl.readEnvFile":            "a file of the caller's own",
	"cmd/sandboxctl.withTar":                "FuzzUnpackCopy",
	"cmd/sandboxctl.unpacker.unpack":        "FuzzUnpackCopy",
	"cmd/sandboxd.readConfigFile":           "the operator's file",
	"pkg/access.load":                       "the operator's file",
	"pkg/agent.Client.Launched":             "FuzzLaunched",
	"pkg/agent.conn.next":                   "FuzzFrames",
	"pkg/agent.checkAnswer":                 "FuzzCheckAnswer",
	"pkg/agent.eachField":                   "FuzzCheckAnswer",
	"pkg/agent.chunksOf":                    "FuzzReadOutput",
	"pkg/agent.exitOf":                      "FuzzWait",
	"pkg/agent.text":                        "FuzzText",
	"pkg/agent.openCalls.sending":           "ttrpc's own frames, on their way out",
	"pkg/agent.streamOf":                    "FuzzFrames",
	"pkg/agent/guest.Service.doLaunch":      "from the daemon",
	"pkg/agent/guest.acknowledged":          "FuzzAcknowledged",
	"pkg/agent/guest.broadcast":             "computes, and reads nothing",
	"pkg/rawfork.Calls.Failed":              "FuzzParseStatus",
	"pkg/agent/guest.confined.parseStatus":  "FuzzParseStatus",
	"pkg/agent/guest.decodeConfig":          "from the daemon",
	"pkg/agent/guest.firstByte":             "computes, and reads nothing",
	"pkg/agent/guest.memoryStats":           "the kernel's words",
	"pkg/agent/guest.parseBoot":             "FuzzParseBoot",
	"pkg/agent/guest.parseContainerBoot":    "from the daemon",
	"pkg/agent/guest.passedDescriptors":     "FuzzPassedDescriptors",
	"pkg/agent/guest.handoverID":            "FuzzHandoverID",
	"pkg/agent/guest.readCopyJob":           "from the agent itself",
	"pkg/agent/guest.receiveBoot":           "from the daemon",
	"pkg/agent/guest.stages.copy":           "what a stage says, which runs the agent's own program; taken for its message only, and FuzzText is what the daemon makes of that",
	"pkg/agent/guest.unpack":                "FuzzUnpack",
	"pkg/agent/guest.userSpec.find":         "FuzzUser",
	"pkg/agent/guest.warmUp":                "its own bytes",
	"pkg/cgroup.diskOf":                     "the kernel's words",
	"pkg/client.rightsOf":                   "from the daemon, which its callers trust",
	"pkg/console.Source.Write":              "FuzzSource",
	"pkg/console.readFile":                  "what Source.Write stored: FuzzSource reads it back",
	"pkg/disk.isClean":                      "two numbers at fixed places of a layer; e2fsck reads the rest",
	"pkg/image.archive.findDocker":          "FuzzImport",
	"pkg/image.boltReader.elements":         "FuzzReadBolt",
	"pkg/image.boltReader.freelist":         "FuzzReadBolt",
	"pkg/image.boltReader.page":             "FuzzReadBolt",
	"pkg/image.checkContent":                "FuzzReadBolt",
	"pkg/image.contentOf":                   "FuzzReadBolt",
	"pkg/image.finishErofs":                 "what mkfs.erofs wrote",
	"pkg/image.finisher.directory":          "what mkfs.erofs wrote",
	"pkg/image.finisher.directoryData":      "what mkfs.erofs wrote",
	"pkg/image.finisher.entry":              "what mkfs.erofs wrote",
	"pkg/image.lzma2Dictionary":             "FuzzImport",
	"pkg/image.parseKnown":                  "the daemon's own file",
	"pkg/image.readBolt":                    "FuzzReadBolt",
	"pkg/image.readDocument":                "FuzzImport",
	"pkg/image.readLayer":                   "FuzzImport",
	"pkg/image.records.all":                 "the daemon's own file",
	"pkg/image.records.get":                 "the daemon's own file",
	"pkg/image.xzReader.openBlock":          "FuzzImport",
	"pkg/image.xzReader.openStream":         "FuzzImport",
	"pkg/image.xzReader.skipIndex":          "FuzzImport",
	"pkg/network.parseRecord":               "FuzzParseRecord",
	"pkg/network.pluginError":               "what a plugin says, which the operator installed; bounded",
	"pkg/oci.readProfile":                   "FuzzCompileSeccomp",
	"pkg/policy.loader.parse":               "FuzzLoad",
	"pkg/runtime/container.agentPhase":      "FuzzAgentPhase",
	"pkg/runtime/container.forkAgent":       "from the daemon to its spawner",
	"pkg/runtime/container.parseBootResult": "FuzzBootResult",
	"pkg/runtime/container.readRecord":      "the daemon's own file",
	"pkg/runtime/container.receive":         "from the daemon to its spawner, and back",
	"pkg/runtime/container.spawning.answer": "from the daemon's spawner",
	"pkg/runtime/microvm.boot.repairLayer":  "two bits at a fixed place of a layer; e2fsck reads the rest, confined",
	"pkg/runtime/microvm.bzImagePayload":    "FuzzParseKernel",
	"pkg/runtime/microvm.checkXZ":           "FuzzParseKernel",
	"pkg/runtime/microvm.eachModule":        "the host's own list of modules",
	"pkg/runtime/microvm.hasPVHNote":        "FuzzParseKernel",
	"pkg/runtime/microvm.loadRecord":        "the daemon's own file",
	"pkg/runtime/microvm.loadVerdict":       "the daemon's own file",
	"pkg/runtime/microvm.newQMP":            "FuzzQMP",
	"pkg/runtime/microvm.parseXZBlock":      "FuzzParseKernel",
	"pkg/runtime/microvm.qmp.executeWith":   "FuzzQMP",
	"pkg/runtime/microvm.qmp.read":          "FuzzQMP",
	"pkg/runtime/microvm.parseSnapshotMeta": "FuzzSnapshotMeta",
	"pkg/runtime/microvm.readTemplateMeta":  "the daemon's own file",
	"pkg/runtime/microvm.unfilterX86":       "FuzzParseKernel",
	"pkg/runtime/microvm.xzBlock.addFilter": "FuzzParseKernel",
	"pkg/vhostvsock.message.u32":            "FuzzMessages",
	"pkg/vhostvsock.message.u64":            "FuzzMessages",
	"pkg/vhostvsock.messageReader.next":     "FuzzReader",
	"pkg/vhostvsock.queue.walk":             "FuzzRings",
	"pkg/vhostvsock.rights":                 "FuzzReader",
	"pkg/workload.entry.restoredConfig":     "the daemon's own file",
	"pkg/workload.parseSnapshotRecord":      "FuzzSnapshotRecord",
	"pkg/workload.Manager.effective":        "the daemon's own file",
	"pkg/workload.journal.next":             "the daemon's own file",
	"pkg/workload.journal.further":          "the daemon's own file",
	"pkg/workload.openLogSegment":           "the daemon's own file",
	"pkg/workload.openStore":                "the daemon's own file",
	"pkg/workload.parseLogHeader":           "the daemon's own file",
	"pkg/workload.store.readLocked":         "the daemon's own file",
}

// Every function that reads bytes is in the list, and every fuzz test that the list names exists.
func TestEveryDecoderIsFuzzed(t *testing.T) {
	functions, found, fuzz := map[string]bool{}, map[string]bool{}, map[string]bool{}
	eachFile(t, func(path string, f *ast.File) {
		for _, d := range f.Decls {
			fn, ok := d.(*ast.FuncDecl)
			if !ok {
				continue
			}
			if isFuzz(path, fn) {
				fuzz[fn.Name.Name] = true
			}
			if strings.HasSuffix(path, "_test.go") {
				continue
			}
			functions[nameOf(path, fn)] = true
			if decodes(fn) {
				found[nameOf(path, fn)] = true
			}
		}
	})
	for _, name := range slices.Sorted(maps.Keys(found)) {
		if decoders[name] == "" {
			t.Errorf("%q reads bytes and is not in the list: name its fuzz test, or say who wrote what it reads", name)
		}
	}
	for name, by := range decoders {
		if !functions[name] {
			t.Errorf("%q is in the list, and there is no such function", name)
		}
		if strings.HasPrefix(by, "Fuzz") && !fuzz[by] {
			t.Errorf("%q: there is no %s", name, by)
		}
	}
}

// make fuzz runs all fuzz tests.
func TestAllFuzzTestsRun(t *testing.T) {
	out, err := exec.Command("bash", root+"/scripts/fuzz.sh", "-l").Output()
	if err != nil {
		t.Fatal(err)
	}
	var want []string
	eachFile(t, func(path string, f *ast.File) {
		for _, d := range f.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok && isFuzz(path, fn) {
				want = append(want, fmt.Sprintf("./%s %s", filepath.Dir(path), fn.Name.Name))
			}
		}
	})
	got := strings.Split(strings.TrimSpace(string(out)), "\n")
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("scripts/fuzz.sh runs\n%s\nwhere there are\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// eachFile calls fn with each Go file of the programs, by its path from the root.
func eachFile(t *testing.T, fn func(path string, f *ast.File)) {
	t.Helper()
	for _, dir := range []string{"pkg", "cmd"} {
		err := filepath.WalkDir(filepath.Join(root, dir), func(path string, e os.DirEntry, err error) error {
			if err != nil {
				return err
			}
			if e.IsDir() && e.Name() == "testdata" {
				return fs.SkipDir
			}
			if !strings.HasSuffix(path, ".go") {
				return nil
			}
			f, err := parser.ParseFile(token.NewFileSet(), path, nil, 0)
			if err != nil {
				return err
			}
			from, err := filepath.Rel(root, path)
			fn(from, f)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}

func isFuzz(path string, fn *ast.FuncDecl) bool {
	return strings.HasSuffix(path, "_test.go") && fn.Recv == nil && strings.HasPrefix(fn.Name.Name, "Fuzz")
}

// nameOf is a function by its package's path, its receiver's type and its name.
func nameOf(path string, fn *ast.FuncDecl) string {
	name := fn.Name.Name
	if fn.Recv != nil {
		of := fn.Recv.List[0].Type
		if star, ok := of.(*ast.StarExpr); ok {
			of = star.X
		}
		if ident, ok := of.(*ast.Ident); ok {
			name = ident.Name + "." + name
		}
	}
	return filepath.Dir(path) + "." + name
}

// decodes reports whether a function calls one of reads.
func decodes(fn *ast.FuncDecl) bool {
	yes := false
	ast.Inspect(fn, func(n ast.Node) bool {
		sel, ok := n.(*ast.SelectorExpr)
		if !ok {
			return true
		}
		of := ""
		switch x := sel.X.(type) {
		case *ast.Ident:
			of = x.Name
		case *ast.SelectorExpr: // binary.BigEndian
			of = x.Sel.Name
		}
		for _, prefix := range reads[of] {
			yes = yes || strings.HasPrefix(sel.Sel.Name, prefix)
		}
		return true
	})
	return yes
}
