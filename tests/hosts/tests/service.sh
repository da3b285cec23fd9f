# The broker as a service of the system: D-Bus activation, polkit, machines that an administrator
# declares, and what is left of them. Each step says its name when it was right.
set -u
manager=(org.godwit.Vmm1 /org/godwit/Vmm1 org.godwit.Vmm1.Manager)
web=/org/godwit/Vmm1/machine/web
kernel=$1

fail() {
    echo "FAILED: $*" >&2
    journalctl --no-pager -n 40 >&2
    exit 1
}

# until_true SECONDS COMMAND...
until_true() {
    local tries
    for tries in $(seq $(($1 * 5))); do
        "${@:2}" && return
        sleep 0.2
    done
    fail "not within $1 s: ${*:2}"
}

# as USER COMMAND...: without an agent that could ask a person
as() {
    setpriv --reuid="$1" --regid="$1" --init-groups "${@:2}" 2>&1
}

# refused NAME COMMAND...: it fails with this word in what it says
refused() {
    local said
    said=$("${@:2}" 2>&1) && fail "not refused: ${*:2}"
    case $said in *"$1"*) ;; *) fail "${*:2} says: $said" ;; esac
}

machine() { busctl "$1" org.godwit.Vmm1 $web org.godwit.Vmm1.Machine "${@:2}"; }
is() { [ "$(machine get-property State)" = "s \"$1\"" ]; }
is_active() { systemctl is-active --quiet "$1"; }
main_pid() { systemctl show -P MainPID "$1"; }

# --- Activation
is_active godwit-broker && fail "the broker runs already"
busctl call "${manager[@]}" ListMachines >/dev/null || fail "no activation"
is_active godwit-broker || fail "the broker is no unit"
echo "activated"

# --- A declared machine
truncate -s 16M /opt/web
cat >/etc/godwit/machines/web.toml <<X
kernel = "$kernel"
memory = "64M"
cmdline = "heartbeat=50"
[[disk]]
path = "/opt/web"
X
busctl call "${manager[@]}" Reload
systemctl start godwit-machine@web || fail "web does not start"
until_true 60 is running
[ "$(machine get-property Unit)" = 's "godwit-machine@web.service"' ] || fail "another unit"
[ "$(systemctl show -P Slice godwit-machine@web)" = godwit-web.slice ] || fail "another slice"
has() { case " $(systemctl show -P "$1" "$2") " in *" $3 "*) ;; *) return 1 ;; esac }
has Before godwit-web-disk0 godwit.target && has After godwit-machine@web godwit.target &&
    is_active godwit.target || fail "its disk would be stopped before it"
# exposes_at_most TENTHS UNIT
exposes_at_most() {
    local said
    said=$(systemd-analyze security --no-pager "--threshold=$1" "$2.service") || fail "$said"
}
exposes_at_most 30 godwit-broker
for unit in godwit-machine@web godwit-web-disk0; do
    exposes_at_most 3 $unit
    [ "$(stat -c %U "/proc/$(main_pid $unit)")" = godwit ] || fail "$unit has another user"
done
echo "declared machine runs"

# --- Who may do what
useradd alice
useradd --groups godwit bob
for list in "as alice" "as bob"; do
    $list busctl call "${manager[@]}" ListMachines >/dev/null || fail "$list: no list"
done
quiet="busctl --allow-interactive-authorization=no call"
refused "allow interactive authorization" as alice $quiet org.godwit.Vmm1 $web org.godwit.Vmm1.Machine Pause t 0
refused "no polkit agent" as alice busctl call org.godwit.Vmm1 $web org.godwit.Vmm1.Machine OpenConsole st "" 0
refused "no polkit agent" as alice godwit pause web
is running || fail "alice has paused it"
as bob $quiet org.godwit.Vmm1 $web org.godwit.Vmm1.Machine Pause t 0 || fail "bob may not"
is paused || fail "bob has not paused it"
as bob godwit resume web || fail "bob may not resume it"
refused "(org.godwit.Vmm1.create)" as bob $quiet "${manager[@]}" CreateMachine 'sa{sv}t' mine 1 kernel s /etc/shadow 0
cat >/etc/polkit-1/rules.d/40-alice.rules <<'X'
polkit.addRule(function (action, subject) {
    if (subject.user == "alice" && action.id == "org.godwit.Vmm1.manage" &&
        action.lookup("machine") == "web" && action.lookup("verb") == "pause") {
        return polkit.Result.YES;
    }
});
X
alice_pauses() { as alice $quiet org.godwit.Vmm1 $web org.godwit.Vmm1.Machine Pause t 0 >/dev/null; }
until_true 30 alice_pauses
is paused || fail "alice has not paused it"
refused "(org.godwit.Vmm1.manage)" as alice $quiet org.godwit.Vmm1 $web org.godwit.Vmm1.Machine Resume t 0
refused "Access denied" as alice busctl call org.freedesktop.DBus / org.freedesktop.DBus \
    RequestName su org.godwit.Vmm1 4
# A person at a terminal is asked for the password of an administrator, who is root here.
echo root:secret | chpasswd
asked=/tmp/asked
: >$asked
{ until_true 60 grep -qs "Password:" $asked; echo secret; } |
    script -qefc "setpriv --reuid=alice --regid=alice --init-groups godwit resume web" $asked >&2 ||
    fail "alice was not asked, or the password was not taken: $(cat $asked)"
is running || fail "alice has not resumed it"
echo "polkit decides"

# --- Deaths
core=$(main_pid godwit-machine@web)
disk=$(main_pid godwit-web-disk0)
kill -9 "$disk"
comes_back() {
    local now
    now=$(main_pid godwit-web-disk0) && [ "$now" != 0 ] && [ "$now" != "$disk" ] && is running
}
until_true 60 comes_back
kill -9 "$(main_pid godwit-broker)"
until_true 60 is running
[ "$(main_pid godwit-machine@web)" = "$core" ] || fail "another core"
kill -9 "$core"
until_true 60 is failed
has_failed() { systemctl is-failed --quiet godwit-machine@web; }
until_true 30 has_failed
gone() { ! systemctl is-active --quiet godwit-web-disk0; }
until_true 30 gone
systemctl start godwit-machine@web || fail "it does not start again"
until_true 60 is running
systemctl restart godwit-broker
until_true 60 is running
echo "the living survive"

# --- To new processes of this host
godwit migrate web local: --max-downtime 2s >/dev/null || fail "web does not move"
is running || fail "web does not run where it has come to"
[ "$(machine get-property Unit)" = 's "godwit-web-core.service"' ] || fail "it is in another unit"
is_active godwit-machine@web && fail "the unit that it left goes on"
disk_process() {
    busctl get-property org.godwit.Vmm1 $web/device/disk0 org.godwit.Vmm1.Device Process | cut -d" " -f2
}
other_disk() {
    local now
    now=$(disk_process) && [ "$now" != 0 ] && [ "$now" != "$disk" ] && is running
}
disk=$(disk_process)
kill -9 "$disk"
until_true 60 other_disk
godwit stop --force web || fail "it does not end there"
systemctl start godwit-machine@web || fail "it does not start in its own unit again"
until_true 60 is running
echo "it moves"

# --- The guest that is installed with everything
godwit run --demo --detach --name shown >/dev/null || fail "no demonstration"
case $(godwit show shown --json=short) in
    *'"kernel":"/usr/lib/godwit/godwit-demo-guest"'*) ;;
    *) fail "it has another kernel: $(godwit show shown --json=short)" ;;
esac
godwit stop --force shown || fail "the demonstration does not end"
echo "the demonstration is installed"

# --- What does not start says why
refused "" systemctl start godwit-machine@nobody
journalctl --no-pager -u godwit-machine@nobody | grep -q "is of no declared machine" ||
    fail "no reason for nobody"
sed 's|/opt/web|/opt/nothing|' /etc/godwit/machines/web.toml >/etc/godwit/machines/web-2.toml
busctl call "${manager[@]}" Reload
unit=$(systemd-escape --template=godwit-machine@.service web-2)
refused "" systemctl start "$unit"
journalctl --no-pager -u "$unit" | grep -q "/opt/nothing cannot be opened" ||
    fail "no reason for web-2"
refused "" systemctl start godwit-machine@web-2
journalctl --no-pager -u godwit-machine@web-2 | grep -q "as systemd-escape says" ||
    fail "no advice for web-2"
rm /etc/godwit/machines/web-2.toml
systemctl reset-failed 'godwit-machine@*'
echo "failures say why"

# --- Starting with the host, and ending
systemctl enable --quiet godwit-machine@web
machine call Terminate t 0 >/dev/null
until_true 60 is off
systemctl start multi-user.target
until_true 60 is running
systemctl disable --quiet godwit-machine@web
# This guest ignores its power button.
mkdir -p /run/systemd/system/godwit-machine@web.service.d
printf '[Service]\nTimeoutStopSec=2\n' >/run/systemd/system/godwit-machine@web.service.d/x.conf
systemctl daemon-reload
systemctl stop godwit-machine@web
until_true 60 is failed
systemctl reset-failed 'godwit-machine@*'
left() { systemctl list-units --all --plain --no-legend 'godwit-*' | grep -v '^godwit-broker.service'; }
nothing_left() { [ -z "$(left)" ]; }
until_true 30 nothing_left
pgrep -u godwit && fail "a process is left"
[ -z "$(ls /run/godwit/machines)" ] || fail "$(ls /run/godwit/machines)"
echo "nothing is left"
