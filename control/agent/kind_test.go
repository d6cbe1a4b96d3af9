package agent

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
)

func (n *node) attachKind(name, netns, a4, kind string) (*controlv1.Pod, error) {
	r, err := n.client.AttachPod(n.t.Context(), &controlv1.AttachPodRequest{Name: name, Netns: netns, Ipv4: a4, Kind: kind})
	return r.GetPod(), err
}

func TestPodsHaveTheKindTheyWereAttachedWith(t *testing.T) {
	cfg, plat := testConfig(t), newFakePlatform()
	n := startNode(t, cfg, plat)
	n.push(threeNodes())
	kinds := map[string]string{"default": "", "veth": KindVeth, "tap": KindTAP}
	for i, name := range []string{"default", "veth", "tap"} {
		pod, err := n.attachKind(name, plat.addNetNS(name), []string{"10.244.1.7", "10.244.1.8", "10.244.1.9"}[i], kinds[name])
		require.NoError(t, err)
		want := kinds[name]
		if want == "" {
			want = KindTAP
		}
		require.Equal(t, want, pod.GetKind())
		require.Equal(t, want, plat.devices[pod.GetNetns()+" eth0"].Kind)
	}
	veth := n.pod("veth")
	// Again, with the kind it has or none; another is another device.
	for _, kind := range []string{"", KindVeth} {
		_, err := n.attachKind("veth", veth.GetNetns(), "10.244.1.8", kind)
		require.NoError(t, err)
	}
	_, err := n.attachKind("veth", veth.GetNetns(), "10.244.1.8", KindTAP)
	require.Equal(t, codes.AlreadyExists, status.Code(err))
	require.ErrorContains(t, err, "kind veth")
	_, err = n.attachKind("other", plat.addNetNS("other"), "10.244.1.10", "macvlan")
	require.Equal(t, codes.InvalidArgument, status.Code(err))
	require.ErrorContains(t, err, `kind "macvlan"`)

	// Another default later changes no pod that is there.
	require.NoError(t, n.stop())
	cfg.PodPort = KindVeth
	n = startNode(t, cfg, plat)
	require.Equal(t, KindTAP, n.pod("default").GetKind())
	require.Equal(t, KindVeth, n.pod("veth").GetKind())
	pod, err := n.attachKind("late", plat.addNetNS("late"), "10.244.1.11", "")
	require.NoError(t, err)
	require.Equal(t, KindVeth, pod.GetKind())
	require.True(t, n.status().GetReady())
}

// pod is an attached pod.
func (n *node) pod(name string) *controlv1.Pod {
	r, err := n.client.ListPods(n.t.Context(), &controlv1.ListPodsRequest{})
	require.NoError(n.t, err)
	for _, p := range r.GetPods() {
		if p.GetName() == name {
			return p
		}
	}
	return nil
}

func TestPodRecordsWithoutAKindAreTAPs(t *testing.T) {
	const record = `{"version":1,"node":"n1","pods":[{"name":"a","netns":"/a","interface":"eth0","ipv4":"10.0.0.1","mac":"0a:00:00:00:00:01",%s"attached_at":"2026-01-01T00:00:00Z"}]}`
	s := podStore{path: filepath.Join(t.TempDir(), "pods.json"), node: "n1"}
	write := func(kind string) {
		require.NoError(t, os.WriteFile(s.path, fmt.Appendf(nil, record, kind), 0o600))
	}
	for text, want := range map[string]string{"": KindTAP, `"kind":"tap",`: KindTAP, `"kind":"veth",`: KindVeth} {
		write(text)
		pods, err := s.Load()
		require.NoError(t, err)
		require.Equal(t, want, pods[0].device(1500).Kind)
	}
	write(`"kind":"macvlan",`)
	_, err := s.Load()
	require.ErrorContains(t, err, "macvlan")
}

func TestVethHostEndsAreStableInterfaceNames(t *testing.T) {
	seen := map[string]bool{}
	for _, pod := range []string{"a", "b", "default/a", "default/b", "kube-system/coredns-7db6d8ff4d-abcde"} {
		name := vethHost(pod)
		require.True(t, validIfName(name), name)
		require.Len(t, name, 14)
		require.Equal(t, name, vethHost(pod))
		require.False(t, seen[name])
		seen[name] = true
	}
}

func TestPodsReceiveAwayFromTheWorkers(t *testing.T) {
	text, err := os.ReadFile(onlineCPUs)
	require.NoError(t, err)
	online, err := ParseCPUs(strings.TrimSpace(string(text)))
	require.NoError(t, err)
	allowed, err := allowedCPUs()
	require.NoError(t, err)
	first := strconv.Itoa(allowed[0])
	for _, c := range []struct {
		setting, workers string
		n                int
		want             []int
	}{
		{"auto", first, 1, slices.DeleteFunc(slices.Clone(online), func(c int) bool { return c == allowed[0] })},
		{"auto", "", len(allowed), slices.DeleteFunc(slices.Clone(online), func(c int) bool { return slices.Contains(allowed, c) })},
		{"auto", "none", 1, nil},
		{"none", first, 1, nil},
		{"0,3-5", first, 1, []int{0, 3, 4, 5}},
	} {
		got, err := podCPUs(c.setting, c.workers, c.n)
		require.NoError(t, err)
		require.ElementsMatch(t, c.want, got, "%+v", c)
	}
}
