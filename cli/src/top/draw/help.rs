//! What the keys do and the figures mean.

use ratatui::Frame;
use ratatui::layout::Rect;
use ratatui::widgets::Paragraph;

const TEXT: &str = "
 q, Ctrl-C   end
 ↑ ↓ (k j)   choose a guest; on a guest's page, scroll
 Enter       the page of the guest that is chosen
 Esc         back to all guests
 s           order by name, CPU, exits, disk requests, frames, memory
 ?           this

 STATE       asked: not heard yet; silent: no proper answer, its page says why
 CPU%        of one host CPU, all vCPUs together; 200 is two CPUs
 EXITS/s     of vCPUs to the VMM; those that the kernel carries out do not count
 DISK/s B/s  requests of all disks, and bytes read and written
 NET/s B/s   frames of all network cards both ways, and their bytes
 MEMORY      of the VMM and its guest, as far as it is in RAM
 PROT        yes: a copy could go on; no: there is none yet; copy: this is one

 k, M and G are thousands, millions, billions; Ki, Mi and Gi powers of 1024.
 A figure that is not known is -.";

/// Draws it.
pub(super) fn draw(frame: &mut Frame<'_>, area: Rect) {
    frame.render_widget(Paragraph::new(TEXT), area);
}
