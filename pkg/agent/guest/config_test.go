package guest

import (
	"reflect"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// What an agent is to do comes through, and what it refuses is seen to be there.
func TestDecodeSpec(t *testing.T) {
	got, err := decodeSpec([]byte(`{"ociVersion": "1.3.0", "hostname": "h", "root": {"path": "r", "readonly": true},
		"process": {"args": ["a"], "cwd": "/", "oomScoreAdj": 1, "user": {"uid": 1, "gid": 2}},
		"mounts": [{"destination": "/d", "type": "tmpfs", "source": "s", "options": ["o"], "uidMappings": [{"containerID": 1}]}],
		"hooks": {"prestart": [{"path": "/bin/true"}]}, "windows": {"layerFolders": ["x"]},
		"linux": {"sysctl": {"k": "v"}, "maskedPaths": ["/m"], "readonlyPaths": ["/ro"], "rootfsPropagation": "shared", "devices": [{"path": "/dev/x"}],
			"seccomp": {"defaultAction": "SCMP_ACT_ALLOW"}, "resources": {"pids": {"limit": 7}, "unified": {"u": "1"}, "memory": {"limit": 5}}}}`))
	if err != nil {
		t.Fatal(err)
	}
	one, limit := 1, int64(7)
	want := &specs.Spec{
		Hostname: "h", Root: &specs.Root{Path: "r", Readonly: true},
		Process: &specs.Process{Args: []string{"a"}, Cwd: "/", OOMScoreAdj: &one, User: specs.User{UID: 1, GID: 2}},
		Mounts:  []specs.Mount{{Destination: "/d", Type: "tmpfs", Source: "s", Options: []string{"o"}, UIDMappings: []specs.LinuxIDMapping{{ContainerID: 1}}}},
		Hooks:   &specs.Hooks{},
		Linux: &specs.Linux{
			Sysctl: map[string]string{"k": "v"}, MaskedPaths: []string{"/m"}, ReadonlyPaths: []string{"/ro"}, RootfsPropagation: "shared",
			Devices: make([]specs.LinuxDevice, 1), Seccomp: &specs.LinuxSeccomp{},
			Resources: &specs.LinuxResources{Pids: &specs.LinuxPids{Limit: &limit}, Unified: map[string]string{"u": "1"}},
		},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v\nwant %+v", got, want)
	}
	for _, refused := range []string{
		`{}`, `{"hooks": {}, "linux": {}}`, `{"linux": {"devices": [{}]}}`, `{"linux": {"seccomp": {}}}`, `{"linux": {"rootfsPropagation": "shared"}}`,
	} {
		config, err := decodeSpec([]byte(refused))
		if err != nil {
			t.Fatal(err)
		}
		if (&rootfs{config: config}).refuse() == nil {
			t.Errorf("%s is taken", refused)
		}
	}
	for _, bad := range []string{``, `[]`, `{"linux": 1}`, `{"linux": {"devices": {}}}`, `{"hooks": 1}`} {
		if _, err := decodeSpec([]byte(bad)); err == nil {
			t.Errorf("%q is decoded", bad)
		}
	}
}
